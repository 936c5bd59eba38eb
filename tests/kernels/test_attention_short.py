"""Short samples laid end to end, by one launch each way: attention of each by itself."""

import itertools

import pytest
import torch
from running import CPU, on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import Ends, attention_short, set_backend
from u2a_fast.kernels.attention_short import short_backward, short_forward

SANITIZERS = ("bounds", "races", "order")

# rows of each sample in q and in k, heads of q and of k, width of a head, keys seen before and after
CASES = {
    "one block": ([5, 1, 9], None, 2, 2, 16, (-1, -1)),
    "several blocks, odd width": ([70, 3, 129], None, 2, 2, 24, (-1, -1)),
    "nobody in the middle": ([4, 0, 3], None, 1, 1, 8, (-1, -1)),
    "shared keys, causal": ([70, 2, 9], None, 4, 2, 8, (-1, 0)),
    "window": ([66, 7], None, 2, 1, 8, (3, 3)),
    "window, causal": ([66, 7], None, 2, 2, 8, (5, 0)),
    "few queries": ([1, 2, 1], [67, 9, 1], 4, 1, 16, (-1, -1)),
    "few queries, causal": ([3, 2], [130, 2], 2, 2, 8, (-1, 0)),
}


def ends_of(queries, keys):
    q, k = (torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32) for rows in (queries, keys))
    return Ends(q, k, max(queries), max(keys))


def by_hand(q, k, v, heads, kv_heads, ends, sides):
    """The formula, sample by sample."""
    each, (q_ends, k_ends) = [], (itertools.pairwise(t.tolist()) for t in ends[:2])
    for own_q, own_k in zip(q_ends, k_ends, strict=True):
        q_, k_, v_ = (t[slice(*own)] for t, own in ((q, own_q), (k, own_k), (v, own_k)))
        queries, keys = len(q_), len(k_)
        q_, k_, v_ = (t.unflatten(1, (n, -1)).transpose(0, 1) for t, n in ((q_, heads), (k_, kv_heads), (v_, kv_heads)))
        k_, v_ = (t.repeat_interleave(heads // kv_heads, 0) for t in (k_, v_))
        at, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
        before, after = (side if side >= 0 else keys for side in sides)
        seen = (key >= at - before) & (key <= at + after)
        scores = (q_ @ k_.transpose(1, 2) * q_.shape[2] ** -0.5).masked_fill(~seen, -torch.inf)
        each.append((scores.softmax(-1) @ v_).transpose(0, 1).flatten(1))
    return torch.cat(each)


def operands(case, dtype):
    """q, kv, dO: every other column of k and v is of the other, as in a buffer of both."""
    queries, keys, heads, kv_heads, width, _ = CASES[case]
    g, rows = torch.Generator().manual_seed(0), sum(keys or queries)
    shapes = (sum(queries), heads * width), (rows, 2 * kv_heads * width), (sum(queries), heads * width)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def run(case, q, kv, d_out):
    """out, and the gradients of q and kv, by the kernels."""
    queries, keys, heads, kv_heads, _, sides = CASES[case]
    ends = ends_of(queries, keys or queries)
    ends = ends._replace(queries=ends.queries.to(q.device), keys=ends.keys.to(q.device))
    options = heads, kv_heads, ends, sides
    d_q, d_kv = (torch.full_like(t, torch.nan) for t in (q, kv))
    out, lse = short_forward(q, *kv.chunk(2, 1), *options)
    short_backward(d_out, q, *kv.chunk(2, 1), out, lse, d_q, *d_kv.chunk(2, 1), *options)
    return out, d_q, d_kv


def exact(case, q, kv, d_out):
    queries, keys, heads, kv_heads, _, sides = CASES[case]
    q, kv = q.requires_grad_(), kv.requires_grad_()
    out = by_hand(q, *kv.chunk(2, 1), heads, kv_heads, ends_of(queries, keys or queries), sides)
    return out.detach(), *torch.autograd.grad(out, (q, kv), d_out)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_launch_each_way_is_attention_sample_by_sample(case):
    given = operands(case, torch.float64)
    with running("triton", CPU, SANITIZERS) as launched:
        got = run(case, *given)
    assert launched == ["attention_short_forward", "attention_short_backward"]
    for t, true in zip(got, exact(case, *given), strict=True):
        torch.testing.assert_close(t, true, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_as_exact_as_the_formula_in_it(case, device):
    given = operands(case, torch.bfloat16)
    with running("triton", device, SANITIZERS):
        got = on(device, lambda *t: run(case, *t))(*given)
    rough = exact(case, *(t.clone() for t in given))
    true = exact(case, *(t.double() for t in given))
    for t, low, high, factor in zip(got, rough, true, (2, 3, 3), strict=True):
        assert_as_exact_as(t, low, high, factor)


@pytest.mark.parametrize("most_keys, width, fits", [(256, 64, True), (257, 64, False), (8, 72, False)])
def test_long_samples_and_wide_heads_are_left_to_libraries(most_keys, width, fits):
    ends = ends_of([most_keys], [most_keys])
    with running("triton", CPU):
        assert attention_short.fits_short(torch.zeros(1, width), width, ends) == fits
    set_backend("torch")
    assert not attention_short.fits_short(torch.zeros(1, width), width, ends)
