"""Operands of transformer_block in fp64: halves of a block with leaves that train, and what their rows see."""

import torch

from u2a_fast.kernels import Attention, Half, Linear, Norm, quantize_rows

WIDTH, HIDDEN, RANK, BATCH, ROWS = 12, 20, 3, 2, 5


def leaf(*shape, mean=0.0, std=0.3):
    return (torch.randn(*shape, dtype=torch.float64) * std + mean).requires_grad_()


def linear(n, k, groups=1, lead=1, adapter=True, bias=True, int8=False):
    weight, scale = (torch.randn(n, k, dtype=torch.float64) * k**-0.5), None
    if int8:
        weight, scale = quantize_rows(weight)
    low = (leaf(groups * RANK, k), leaf(n, RANK)) if adapter else (None, None)
    return Linear(weight, leaf(n) if bias else None, *low, scale, 0.7, groups, lead)


def halves(pre_norm=True, scale=False, rms=False, gated=False, fc1=(1, 1), kv_heads=2, **options):
    norms = [Norm(leaf(WIDTH, mean=1.0), None if rms else leaf(WIDTH), 1e-5, rms) for _ in range(2)]
    before, after = (norms, [Norm(), Norm()]) if pre_norm else ([Norm(), Norm()], norms)
    scales = [torch.rand(WIDTH, dtype=torch.float64) + 0.5 if scale else None for _ in range(2)]
    qkv = linear((1 + kv_heads) * WIDTH, WIDTH, 3, 2 // kv_heads, **options)
    attention = Half(before[0], qkv, linear(WIDTH, WIDTH), scales[0], after[0])
    first = linear(2 * HIDDEN, WIDTH, 2, **options) if gated else linear(HIDDEN, WIDTH, *fc1, **options)
    mlp = Half(before[1], first, linear(WIDTH, HIDDEN, **options), scales[1], after[1])
    return attention, mlp


def see(lengths=None, suffix=0, causal=False, **more):
    return Attention(2, (BATCH, ROWS, ROWS), lengths, suffix, causal, **more)
