"""A linear layer with LoRA: a frozen linear with a low-rank path from its input, forward and backward.

    S = dropout(x) A^T        y = x W^T + b + s S B^T

x [M, K], W [N, K] (floating, or int8 with scales [N]), b [N], A [groups * r, K], B [N, r], s a number; M counts all
leading dimensions of x. With `groups` projections side by side, the first `lead` times as wide as each other, group g
of the outputs uses block g of the rows of A. S carries the dtype of x and is kept for backward; x is kept only for dA.
The second product is linear_lowrank.py, the backward linear_backward.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, products
from .backend import jit, tl
from .chunks import flat
from .dropout import drop, kept_tile, threshold
from .linear_backward import gradients, save
from .linear_lowrank import (
    check,
    check_factors,
    frozen_linear_reference,
    is_plain,
    linear_lowrank_aten,
    linear_lowrank_reference,
    linear_lowrank_triton,
)
from .tiling import accumulator, dot_precision, rank_tile

PROJECT_TILE = {"BM": 64, "BK": 128, "num_warps": 4, "num_stages": 3}


# ----------------------------------------------------------------------------------------------------------- reference
def lora_linear_reference(
    x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, dropout, seed, quantize_input
):
    """x [..., K] -> [..., N]"""
    if lora_a is None:
        return frozen_linear_reference(x, weight, bias, weight_scale, quantize_input)
    dropped = x if seed is None else drop(x, dropout, seed) / (1 - dropout)
    s = F.linear(dropped, lora_a.to(x.dtype))
    return linear_lowrank_reference(x, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input)


# -------------------------------------------------------------------------------------------------------------- Triton
@jit(varying=("dropped_below", "scale", "M"))
def lora_linear_project(
    X,  # [M, K]
    A,  # [R, K]
    SEED,  # [] int64 or None
    S,  # [M, R]
    dropped_below,
    scale,  # 1 / (1 - p)
    M,
    K,
    R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """S = scale (mask x) A^T for BM rows and BR ranks"""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rr = tl.program_id(1) * BR + tl.arange(0, BR)
    rk = tl.arange(0, BK)
    row = rm[:, None].to(tl.int64)
    mok = rm < M
    rok = rr < R
    acc = tl.zeros((BM, BR), ACC)
    for k in range(0, K, BK):
        kok = rk < K - k
        x = tl.load(X + row * K + (k + rk)[None, :], mask=mok[:, None] & kok[None, :], other=0.0)
        if SEED is not None:
            x = tl.where(kept_tile(SEED, rm, k + rk, dropped_below), x, 0)
        a = tl.load(A + rr[None, :] * K + (k + rk)[:, None], mask=rok[None, :] & kok[:, None], other=0.0)
        acc = tl.dot(x, a.to(x.dtype), acc, out_dtype=ACC, input_precision=PRECISION)
    tl.store(S + row * R + rr[None, :], (acc * scale).to(S.dtype.element_ty), mask=mok[:, None] & rok[None, :])


def project_triton(x, lora_a, dropout, seed):
    """x [M, K], lora_a [R, K] -> S [M, R]"""
    (m, k), r, tile = x.shape, lora_a.shape[0], PROJECT_TILE
    s, block = x.new_empty(m, r), rank_tile(r)
    x, lora_a = backend.contiguous(x, lora_a)
    backend.launch(
        lora_linear_project,
        (-(-m // tile["BM"]), -(-r // block)),
        X=x,
        A=lora_a,
        SEED=seed,
        S=s,
        dropped_below=threshold(dropout),
        scale=1 / (1 - dropout),
        M=m,
        K=k,
        R=r,
        ACC=accumulator(x.dtype),
        PRECISION=dot_precision(x.dtype),
        BR=block,
        **tile,
    )
    return s


# ---------------------------------------------------------------------------------------------------------------- ATen
def project_aten(x, lora_a, dropout, seed):
    """As `project_triton`."""
    a = lora_a.to(x.dtype).t()
    if seed is None:
        return products.mm(x, a)
    return products.addmm(x.new_empty(a.shape[1]), drop(x, dropout, seed), a, beta=0, alpha=1 / (1 - dropout))


# -------------------------------------------------------------------------------------------------------- registration
def _with(project, linear_lowrank):
    def forward(x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, dropout, seed, quantize_input):
        """y [..., N] and S [..., groups * r], None without an adapter."""
        s = None if lora_a is None else project(flat(x), lora_a, dropout, seed).view(*x.shape[:-1], lora_a.shape[0])
        operands = (x, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input)
        return linear_lowrank(*operands, None, None), s

    return forward


def _fake(x, weight, bias, lora_a, *_):
    s = None if lora_a is None else x.new_empty(*x.shape[:-1], lora_a.shape[0])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), s


_lora_linear = backend.Op(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling, "
    "Tensor? weight_scale, int groups, int lead, float dropout, Tensor? seed, bool quantize_input) -> (Tensor, Tensor)",
    aten=_with(project_aten, linear_lowrank_aten),
    triton=_with(project_triton, linear_lowrank_triton),
    fake=_fake,
)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, dropout, seed, int8):
        operands = (x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, dropout, seed, int8)
        y, s = _lora_linear(*operands)
        ctx.scaling, ctx.groups, ctx.lead, ctx.dropout = scaling, groups, lead, dropout
        save(ctx, x, weight, bias, weight_scale, s, lora_a, lora_b, seed)
        return y

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        return *gradients(ctx, dy), *[None] * 7


# -------------------------------------------------------------------------------------------------------------- public
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    weight_scale: Tensor | None = None,
    groups: int = 1,
    lead: int = 1,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    quantize_input: bool = False,
) -> Tensor:
    """A linear layer with LoRA: `x W^T + b + scaling dropout(x) A^T B^T`, [..., N] in the dtype of x or of autocast.

    Args:
        x: [..., K].
        weight: [N, K], floating, or int8 with `weight_scale` (w = int8 * scale).
        bias: [N] or None.
        lora_a: [groups * r, K]; None together with `lora_b` leaves the frozen linear alone.
        lora_b: [N, r]; group g of its rows uses block g of the rows of `lora_a`.
        scaling: multiplies the low-rank product.
        weight_scale: [N] fp32.
        groups: projections side by side in N, 3 for q, k, v.
        lead: how many times as wide as each other the first of them is.
        dropout: probability that an element of x is dropped on its way to `lora_a`.
        seed: what the dropout mask is drawn from; None: a fresh seed from torch's generator. The mask is not stored.
        quantize_input: multiply int8 rows of x by the int8 weight (W8A8); the backward dequantises the weight.

    Gradients reach x, bias, lora_a, lora_b and a floating weight; an operand is kept only if one of them needs it.

    >>> lora_linear(torch.ones(1, 2), torch.eye(2), None, torch.ones(1, 2), torch.ones(2, 1), scaling=0.5)
    tensor([[2., 2.]])
    """
    check(x, weight, bias, lora_a, lora_b, weight_scale, groups, lead, quantize_input)
    check_factors(lora_a, lora_b, groups, x.shape[-1])
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    if dropout == 0 or lora_a is None:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    elif not torch.is_tensor(seed):
        seed = torch.full((), seed & (2**63 - 1), dtype=torch.int64, device=x.device)
    elif seed.is_floating_point() or seed.numel() != 1:
        raise ValueError(f"seed must be one whole number, not {seed.dtype} {tuple(seed.shape)}")
    else:
        seed = seed.to(torch.int64)  # of fewer bits, its halves would be no halves
    x = backend.in_autocast_dtype(x)
    operands = (x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, dropout, seed, quantize_input)
    if backend.resolve(x, weight, bias, lora_a, lora_b, weight_scale, seed) == "reference":
        return lora_linear_reference(*operands)
    if lora_a is None and is_plain(x, weight, bias):
        return products.linear(x, weight, bias)
    if backend.needs_grad(x, weight, bias, lora_a, lora_b):
        return _LoraLinear.apply(*operands)
    return _lora_linear(*operands)[0]
