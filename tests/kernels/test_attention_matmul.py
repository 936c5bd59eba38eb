"""Behind a short window a CPU multiplies a block of queries with the keys around it, and nobody sees a difference."""

import pytest
import torch
from tolerance import assert_as_exact_as
from torch.utils._python_dispatch import TorchDispatchMode

from u2a_fast.kernels import Group, attention, attention_rows, set_backend
from u2a_fast.kernels.attention_matmul import BLOCK, WORTH, is_local

WINDOW = 5
TOKENS = WORTH * (2 * WINDOW + BLOCK) + 1  # the fewest that are taken in blocks
CASES = {  # token rows, suffix rows, heads, heads of k and v, causal
    "plain": (TOKENS, 0, 2, 2, False),
    "suffix": (TOKENS + 7, 3, 2, 2, False),
    "causal": (TOKENS, 0, 2, 2, True),
    "causal, suffix, shared keys": (TOKENS + BLOCK, 2, 4, 2, True),
    "shared keys, suffix": (TOKENS + 1, 1, 3, 1, False),
}


def operands(case, dtype=torch.float64, batch=2, width=4):
    tokens, suffix, heads, kv_heads, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, tokens + suffix, width) for count in (heads, kv_heads, kv_heads, heads)]
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype) for shape in shapes]


def results(case, backend, dtype, *given):
    """out, dq, dk, dv"""
    _, suffix, _, _, causal = CASES[case]
    set_backend(backend)
    q, k, v, d_out = (t.to(dtype) for t in given)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, suffix=suffix, causal=causal, window=WINDOW)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_as_exact_as_plain_low_precision(case, dtype):
    tokens, suffix, *_ = CASES[case]
    assert is_local(tokens + suffix, None, suffix, WINDOW, None)
    given = operands(case, dtype)
    exact = results(case, "reference", torch.float64, *given)
    plain, got = (results(case, backend, dtype, *given) for backend in ("reference", "torch"))
    for i, (ours, rough, true) in enumerate(zip(got, plain, exact, strict=True)):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)
        else:
            assert_as_exact_as(ours, rough, true, 2 if i == 0 else 3, ("out", "dq", "dk", "dv")[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_long_and_short_samples_of_packed_rows(dtype):
    """With an adapter behind, whose gradient needs the forward's result once more."""
    groups = [Group(2, TOKENS + 2, TOKENS + 2), Group(3, 7, 7)]
    rows, heads, width = sum(samples * queries for samples, queries, _ in groups), 2, 4
    generator = torch.Generator().manual_seed(1)
    qkv, a, d_out, d_s = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, 3 * heads * width), (3, heads * width), (rows, heads * width), (rows, 3))
    )

    def run(backend, dtype):
        set_backend(backend)
        leaves = [t.to(dtype).requires_grad_() for t in (qkv, a)]
        out, s = attention_rows(leaves[0], None, heads, groups, leaves[1], suffix=2, window=WINDOW)
        grads = torch.autograd.grad((out, s), leaves, (d_out.to(dtype), d_s.to(dtype)))
        return [out.detach(), s.detach(), *grads]

    exact, plain, got = run("reference", torch.float64), run("reference", dtype), run("torch", dtype)
    for i, (ours, rough, true) in enumerate(zip(got, plain, exact, strict=True)):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-10)
        else:
            assert_as_exact_as(ours, rough, true, 2 if i < 2 else 3, str(i))


class Largest(TorchDispatchMode):
    """The most elements that a result inside had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result):
            self.elements = max(self.elements, result.numel())
        return result


def test_nothing_as_large_as_rows_times_rows_exists():
    q, k, v, d_out = operands("plain", batch=1)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with Largest() as seen:
        torch.autograd.grad(attention(*leaves, window=WINDOW), leaves, d_out)
    assert TOKENS * 4 <= seen.elements < TOKENS**2


@pytest.mark.parametrize(
    "seen", [dict(lengths=torch.tensor([3])), dict(positions=torch.zeros(1, 9)), dict(window=None)]
)
def test_what_blocks_do_not_know_runs_in_one_piece(seen):
    seen = {"lengths": None, "suffix": 0, "window": WINDOW, "positions": None} | seen
    assert not is_local(TOKENS, **seen)
