"""Attention with the low-rank product of its result: both are what they are apart, and the result is not kept."""

import pytest
import torch
from tolerance import assert_as_exact_as

from u2a_fast.kernels import attention, attention_project, set_backend
from u2a_fast.memory import saved_bytes

CASES = {
    "plain": {},
    "lengths": {"lengths": (9, 0, 4)},
    "suffix": {"lengths": (7, 0, 3), "suffix": 2},
    "causal": {"causal": True, "lengths": (9, 1, 4)},
}


def operands(dtype, heads=2, rows=9, width=20, rank=3):
    """One q,k,v buffer [B, S, 3, H, Dh] with a non-zero mean, A, and a weight for either result."""
    g = torch.Generator().manual_seed(0)
    shapes = (3, rows, 3, heads, width), (rank, heads * width), (3, heads, rows, width), (3, rows, rank)
    qkv, a, d_out, d_s = (torch.randn(s, generator=g, dtype=torch.float64) + 0.3 for s in shapes)
    return qkv.to(dtype).requires_grad_(), a.to(dtype).requires_grad_(), d_out.to(dtype), d_s.to(dtype)


def options(case):
    given = dict(CASES[case])
    if "lengths" in given:
        given["lengths"] = torch.tensor(given["lengths"])
    return given


def visible(case, rows=9):
    """float [B, 1, S, 1]: 0 at rows of padding, which are undefined."""
    lengths, suffix = CASES[case].get("lengths", (rows,) * 3), CASES[case].get("suffix", 0)
    position = torch.arange(rows)
    kept = (position < torch.tensor(lengths)[:, None]) | (position >= rows - suffix)
    return kept[:, None, :, None].double()


def results(f, qkv, a, d_out, d_s, case):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, s = f(q, k, v, a, **options(case))
    shown = visible(case).to(out.dtype)
    loss = (out * d_out * shown).sum() + (s * d_s * shown[:, 0]).sum()
    return [(out * shown).detach(), (s * shown[:, 0]).detach(), *torch.autograd.grad(loss, (qkv, a))]


def apart(q, k, v, a, **options):
    out = attention(q, k, v, **options)
    return out, out.transpose(1, 2).flatten(2) @ a.t()


def fp64(tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_both_results_and_all_gradients_are_those_of_the_two_steps(backend, dtype, case):
    tensors = operands(dtype)
    set_backend("reference")
    plain, exact = results(apart, *tensors, case), results(apart, *fp64(tensors), case)
    set_backend(backend)
    for i, (got, low, high) in enumerate(zip(results(attention_project, *tensors, case), plain, exact, strict=True)):
        assert_as_exact_as(got, low, high, 2 if i < 2 else 3, ("out", "s", "qkv", "lora_a")[i])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_op_passes_gradcheck(case):
    qkv, a, *_ = operands(torch.float64, width=4, rows=9)
    given = {"lengths": None, "suffix": 0, "causal": False} | options(case)

    def f(qkv, a):
        out, s = torch.ops.u2a_fast.attention_project(*qkv.permute(2, 0, 3, 1, 4), a, *given.values())
        shown = visible(case)
        return out * shown, s * shown[:, 0]

    assert torch.autograd.gradcheck(f, (qkv, a))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_op_passes_opcheck(case):
    qkv, a, *_ = operands(torch.bfloat16)
    q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4))
    given = {"lengths": None, "suffix": 0, "causal": False} | options(case)
    torch.library.opcheck(torch.ops.u2a_fast.attention_project, (q, k, v, a, *given.values()))


def test_only_q_k_v_and_a_are_kept():
    qkv, a, *_ = operands(torch.bfloat16)

    def f():
        return attention_project(*qkv.permute(2, 0, 3, 1, 4), a)

    assert saved_bytes(f) == (qkv.numel() + a.numel()) * 2


def test_autocast_computes_in_its_dtype():
    qkv, a, *_ = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, s = attention_project(*qkv.permute(2, 0, 3, 1, 4), a)
    expected = apart(*qkv.permute(2, 0, 3, 1, 4), a)
    assert out.dtype == s.dtype == torch.bfloat16
    assert all(torch.allclose(got.float(), e, rtol=0.05, atol=0.1) for got, e in zip((out, s), expected, strict=True))


def test_without_lora_a_it_is_attention_and_a_wrong_one_is_refused():
    qkv, a, *_ = operands(torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, s = attention_project(q, k, v, None)
    assert s is None and torch.equal(out, attention(q, k, v))
    with pytest.raises(ValueError, match="H \\* Dh"):
        attention_project(q, k, v, a[:, :-1])


def test_zero_samples():
    q = torch.zeros(0, 2, 5, 4, dtype=torch.bfloat16, requires_grad=True)
    a = torch.zeros(3, 8, requires_grad=True)
    out, s = attention_project(q, q, q, a)
    assert out.shape == (0, 2, 5, 4) and s.shape == (0, 5, 3)
    (out.sum() + s.sum()).backward()
    assert a.grad.shape == (3, 8) and not a.grad.any()
