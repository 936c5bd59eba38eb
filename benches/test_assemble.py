"""Joining learned rows, LayerNorm and the product with A in one pass, forward and backward, against plain aten.

    pytest benches/test_assemble.py --benchmark-only -s

16 samples of 197 rows of width 768 and one learned row each, A of rank 24 (q, k, v of rank 8); all present, and 70%
absent, whose rows the mask token replaces. There is no limit: the pass is bound by bytes, and what it saves on a CPU is
memory traffic beside the products.
"""

import pytest
import torch
from arms import DEVICE, FAST, hold, measure, nbytes, rotating
from torch.nn import functional as F

from u2a_fast import kernels
from u2a_fast.memory import saved_bytes

SAMPLES, TOKENS, WIDTH, RANK, ROUNDS = 16, 197, 768, 24, 25


def passes(width, rank, present):
    """Name -> function of the tokens that gives the sum of all results."""
    norm_weight, norm_bias = torch.rand(width, device=DEVICE) + 0.5, torch.randn(width, device=DEVICE)
    suffix = torch.randn(1, width, device=DEVICE, requires_grad=True)
    mask_token = torch.randn(width, device=DEVICE, requires_grad=True)
    a = torch.randn(rank, width, device=DEVICE, requires_grad=True)

    def aten(tokens):
        dtype = tokens.dtype
        if present is not None:
            tokens = torch.where(present[:, None, None], tokens, mask_token.to(dtype))
        rows = torch.cat([tokens, suffix.to(dtype).expand(len(tokens), -1, -1)], dim=1)
        h = F.layer_norm(rows, (width,), norm_weight.to(dtype), norm_bias.to(dtype))
        return h, F.linear(h, a.to(dtype)), rows

    def ours(tokens):
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "lora_a": a}
        learned = {"suffix": suffix, "present": present, "mask_token": None if present is None else mask_token}
        return kernels.assemble_norm_project(tokens=tokens, **learned, **norm)

    return {"aten": aten, "ours": ours}


def time_assemble(benchmark, missing, rounds, samples=SAMPLES, tokens=TOKENS, width=WIDTH, rank=RANK):
    present = None
    if missing:
        present = (torch.arange(samples) >= round(missing * samples)).to(DEVICE)
    arms = passes(width, rank, present)

    def inputs():
        x = torch.randn(samples, tokens, width, device=DEVICE, dtype=FAST, requires_grad=True)
        grads = (torch.randn(samples, tokens + 1, n, device=DEVICE, dtype=FAST) for n in (width, rank, width))
        return x, tuple(grads)

    x, grads = inputs()
    expected = arms["aten"](x)
    for theirs, result in zip(expected, arms["ours"](x), strict=True):
        assert (theirs - result).float().norm() < 0.02 * theirs.float().norm()
    turns = rotating(inputs, nbytes(x, *grads))

    def run(make):
        x, grads = next(turns)
        torch.autograd.backward(make(x), grads)

    facts = {
        "saved_bytes": {name: saved_bytes(lambda make=make: make(x)) for name, make in arms.items()},
        "bytes": 2 * nbytes(x, *grads),
        "real_rows": samples * tokens,
        "missing_rate": missing,
        "rank": rank,
    }
    return measure(benchmark, {n: (lambda make=m: run(make)) for n, m in arms.items()}, "aten", rounds, **facts)


@pytest.mark.parametrize("missing", [0.0, 0.7], ids=["full presence", "70% missing"])
def test_assemble(benchmark, missing):
    rows = time_assemble(benchmark, missing, ROUNDS)
    hold(benchmark, {f"assemble, {missing:.0%} missing: over aten": rows["ours"]["ratio"]})


def test_smoke(benchmark):
    time_assemble(benchmark, 0.5, 2, samples=4, tokens=5, width=32, rank=4)
