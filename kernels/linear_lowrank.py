"""A frozen linear layer plus a low-rank product whose left factor is given.

    y = h W^T + b + s S B^T

h [M, K], W [N, K] (floating, or int8 with scales [N]), b [N], S [M, groups * r], B [N, r], s a number; M counts all
leading dimensions of h. With `groups` projections side by side (q, k, v), block g of the N / groups outputs uses block
g of S: B is block-diagonal and only its diagonal is stored. The backward is in linear_backward.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .backend import jit, tl
from .linear_backward import as_float, blocks, flat, gradients, save
from .quantize import (
    TINY,
    QuantizedRows,
    chunk_buffer,
    dequantize_rows_reference,
    launch_quantize_rows,
    quantize_rows_aten,
    row_chunks,
)
from .tiling import accumulator, check_rows, dot_precision, gemm_tile, rank_tile, tile_index


# ----------------------------------------------------------------------------------------------------------- reference
def frozen_linear_reference(h, weight, bias, weight_scale, quantize_input):
    """h W^T + b. A quantised input is differentiated straight through: dH = dY W with the dequantised weight."""
    if weight_scale is None:
        return F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))
    wide = backend.wide(h.dtype)
    rows = h.to(wide)
    if quantize_input:
        scale = rows.detach().abs().amax(-1, keepdim=True) / 127
        rounded = (rows.detach() / scale.clamp_min(TINY)).round() * scale
        rows = rows + (rounded - rows).detach()
    y = F.linear(rows, dequantize_rows_reference(weight, weight_scale.detach(), wide))
    return (y if bias is None else y + bias.to(wide)).to(h.dtype)


def linear_lowrank_reference(h, weight, bias, s, lora_b, scaling, weight_scale, groups, quantize_input):
    """h [..., K], s [..., groups * r] -> [..., N]"""
    y = frozen_linear_reference(h, weight, bias, weight_scale, quantize_input)
    if lora_b is None:
        return y
    s = s.unflatten(-1, (groups, lora_b.shape[1]))
    b = lora_b.to(h.dtype).unflatten(0, (groups, -1))
    return y + scaling * torch.einsum("...gr,gnr->...gn", s, b).flatten(-2)


# -------------------------------------------------------------------------------------------------------------- Triton
@jit
def linear_lowrank_forward(
    H,  # [M, K], int8 if HS is given
    HS,  # [M] fp32 scales of H's rows, or None
    W,  # [N, K], int8 if WS is given
    WS,  # [N] fp32 scales of W's rows, or None
    BIAS,  # [N] or None
    S,  # [M, GROUPS * R] or None
    B,  # [N, R]
    Y,  # [M, N]
    scaling,
    M,
    WIDTH,  # N / GROUPS
    K,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """The low-rank product and the bias are the last steps of the GEMM. A tile of columns lies within one group.

    Rows and columns past the end read the first ones and are not stored: the loop then needs no mask but K's.
    """
    tiles = tl.cdiv(WIDTH, BN)
    pm, pn = tile_index(tl.program_id(0), tl.cdiv(M, BM), GROUPS * tiles)
    group = pn // tiles
    rm = pm * BM + tl.arange(0, BM)
    column = (pn % tiles) * BN + tl.arange(0, BN)
    rn = group * WIDTH + column
    rk = tl.arange(0, BK)
    mok = rm < M
    nok = column < WIDTH
    hp = H + (rm % M)[:, None].to(tl.int64) * K + rk[None, :]
    wp = W + (group * WIDTH + column % WIDTH)[None, :] * K + rk[:, None]
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        if EVEN:
            h = tl.load(hp)
            w = tl.load(wp)
        else:
            h = tl.load(hp, mask=(rk < K - k)[None, :], other=0)
            w = tl.load(wp, mask=(rk < K - k)[:, None], other=0)
        acc = tl.dot(h, w.to(h.dtype), acc, out_dtype=ACC, input_precision=PRECISION)  # int8 -> bf16 is exact
        hp += BK
        wp += BK
    y = acc.to(WIDE)
    if HS is not None:
        y *= tl.load(HS + rm, mask=mok, other=0.0)[:, None]
    if WS is not None:
        y *= tl.load(WS + rn, mask=nok, other=0.0)[None, :]
    if S is not None:
        for r in tl.range(0, R, BR, num_stages=1):
            rr = r + tl.arange(0, BR)
            s_at = S + rm[:, None].to(tl.int64) * (GROUPS * R) + group * R + rr[None, :]
            s = tl.load(s_at, mask=mok[:, None] & (rr < R)[None, :], other=0.0)
            b = tl.load(B + rn[None, :] * R + rr[:, None], mask=nok[None, :] & (rr < R)[:, None], other=0.0)
            y = tl.dot(s, (b * scaling).to(s.dtype), y, out_dtype=WIDE, input_precision=PRECISION)
    if BIAS is not None:
        y += tl.load(BIAS + rn, mask=nok, other=0.0).to(WIDE)[None, :]
    y_at = Y + rm[:, None].to(tl.int64) * (GROUPS * WIDTH) + rn[None, :]
    tl.store(y_at, y.to(Y.dtype.element_ty), mask=mok[:, None] & nok[None, :])


def linear_lowrank_triton(h, weight, bias, s, lora_b, scaling, weight_scale, groups, quantize_input, quantized=None):
    """h [M, K], s [M, groups * r] or None -> [M, N]; quantized: q [M, K] and scale [M] of h, or None"""
    (m, k), n, dtype, h_scale = h.shape, weight.shape[0], h.dtype, None
    check_rows(m)
    r = 0 if lora_b is None else lora_b.shape[1]
    y = h.new_empty(m, n)
    if quantize_input:
        h, h_scale = quantized or launch_quantize_rows(h)
    h, h_scale, weight, weight_scale = backend.contiguous(h, h_scale, weight, weight_scale)
    bias, s, lora_b = backend.contiguous(bias, s, lora_b)
    tile = gemm_tile(h.dtype)
    backend.launch(
        linear_lowrank_forward,
        (-(-m // tile["BM"]) * groups * -(-n // groups // tile["BN"]),),
        *(h, h_scale, weight, weight_scale, bias, s if r else None, lora_b, y, scaling, m, n // groups, k),
        R=r,
        GROUPS=groups,
        ACC=accumulator(h.dtype),
        WIDE=accumulator(dtype),
        PRECISION=dot_precision(),
        EVEN=k % tile["BK"] == 0,
        BR=rank_tile(r),
        **tile,
    )
    return y


# ---------------------------------------------------------------------------------------------------------------- ATen
def int8_product(h: Tensor, weight: Tensor) -> Tensor:
    """h [M, K] int8, weight [N, K] int8 -> [M, N] int32. On a GPU ATen wants more than 16 rows and multiples of 8."""
    h, weight = backend.contiguous(h, weight)  # rows of stride 0 are read past their end
    if h.device.type == "cpu":
        return torch._int_mm(h, weight.t())
    (m, k), n = h.shape, weight.shape[0]
    h = F.pad(h, (0, -k % 8, 0, max(0, 17 - m)))
    return torch._int_mm(h, F.pad(weight, (0, -k % 8, 0, -n % 8)).t())[:m, :n]


def linear_int8(h, weight, bias, weight_scale, quantized):
    """Rows of h [M, K] quantised, times int8 weight [N, K] -> [M, N]; scales and bias while a chunk is in cache."""
    q, h_scale = quantized or quantize_rows_aten(h)
    product, wide = int8_product(q, weight), backend.wide(h.dtype)
    y, h_scale, weight_scale = h.new_empty(product.shape), h_scale.to(wide), weight_scale.to(wide)
    bias, chunks = None if bias is None else bias.to(wide), row_chunks(product)
    buffer = chunk_buffer(product, chunks, wide)
    for s in chunks:
        part = buffer[: len(product[s])].copy_(product[s]).mul_(h_scale[s, None])
        y[s] = part.mul_(weight_scale) if bias is None else torch.addcmul(bias, part, weight_scale, out=part)
    return y


def linear_lowrank_aten(h, weight, bias, s, lora_b, scaling, weight_scale, groups, quantize_input, quantized=None):
    """As `linear_lowrank_triton`; the low-rank product is added in place, block by block."""
    if quantize_input:
        y = linear_int8(h, weight, bias, weight_scale, quantized)
    else:
        w = as_float(weight, weight_scale, h.dtype).t()
        y = h @ w if bias is None else torch.addmm(bias.to(h.dtype), h, w)
    if lora_b is not None:
        b = lora_b.to(h.dtype)
        for rows, columns in blocks(*b.shape, groups):
            y[:, rows].addmm_(s[:, columns], b[rows].t(), alpha=scaling)
    return y


# ------------------------------------------------------------------------------------------------------------------ op
@torch.library.custom_op(
    "u2a_fast::linear_lowrank",
    mutates_args=(),
    schema="(Tensor h, Tensor weight, Tensor? bias, Tensor? s, Tensor? lora_b, float scaling, "
    "Tensor? weight_scale, int groups, bool quantize_input, Tensor? q, Tensor? scale) -> Tensor",
)
def _linear_lowrank(h, weight, bias, s, lora_b, scaling, weight_scale, groups, quantize_input, q, scale):
    """q [..., K] and scale [M]: h, quantised already."""
    forward = linear_lowrank_triton if backend.resolve(weight) == "triton" else linear_lowrank_aten
    quantized = None if q is None else (flat(q), scale)
    y = forward(flat(h), weight, bias, flat(s), lora_b, scaling, weight_scale, groups, quantize_input, quantized)
    return y.view(*h.shape[:-1], y.shape[1])


@_linear_lowrank.register_fake
def _(h, weight, bias, s, lora_b, scaling, weight_scale, groups, quantize_input, q, scale):
    return h.new_empty(*h.shape[:-1], weight.shape[0])


def _save(ctx, inputs, output):
    h, weight, bias, s, lora_b, ctx.scaling, weight_scale, ctx.groups, *_ = inputs
    ctx.dropout = 0.0
    save(ctx, h, weight, bias, weight_scale, s, None, lora_b, None)


_linear_lowrank.register_autograd(lambda ctx, dy: (*gradients(ctx, dy), *[None] * 6), setup_context=_save)


# ------------------------------------------------------------------------------------------------------------- public
def check(x, weight, bias, lora_a, lora_b, weight_scale, groups, quantize_input):
    """Refuse what `linear_lowrank` and `lora_linear` cannot compute."""
    operands = {"the input": x, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "weight_scale": weight_scale}
    if weight.dtype != torch.int8:
        operands["weight"] = weight
    for name, operand in operands.items():
        if operand is not None and not operand.is_floating_point():
            raise TypeError(f"{name} must be floating, not {operand.dtype}: convert it first")
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight must be [N, K] for an input [..., K], not {tuple(weight.shape)} for {tuple(x.shape)}")
    n = weight.shape[0]
    if weight.numel() >= 2**31:
        raise ValueError(f"weight {tuple(weight.shape)} has 2**31 elements or more: split it by rows")
    if (weight.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError(
            f"weight_scale goes with an int8 weight and only with it: weight is {weight.dtype}, "
            f"weight_scale {'missing' if weight_scale is None else 'given'}"
        )
    if quantize_input and weight.dtype != torch.int8:
        raise ValueError(f"int8 rows need an int8 weight, not {weight.dtype}: see quantize_rows")
    for name, vector in (("bias", bias), ("weight_scale", weight_scale)):
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name} must be [{n}] like the weight's rows, not {tuple(vector.shape)}")
    if lora_b is not None and (lora_b.dim() != 2 or lora_b.shape[0] != n):
        raise ValueError(f"lora_b must be [{n}, r] like the weight's rows, not {tuple(lora_b.shape)}")
    if groups < 1 or n % groups:
        raise ValueError(f"groups must divide the weight's {n} rows, and {groups} does not")


def linear_lowrank(
    h: Tensor | QuantizedRows,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    weight_scale: Tensor | None = None,
    groups: int = 1,
    quantize_input: bool = False,
) -> Tensor:
    """`lora_linear` with S given: `h W^T + b + scaling S B^T`, [..., N] in the dtype of h or of autocast.

    Args:
        h: [..., K]; not kept for backward unless the weight is trained. Or int8 rows, from the pass that wrote h
            (`assemble_norm_project(quantize=True)`), for an int8 weight.
        s: [..., groups * r], h A^T without the scaling; None together with `lora_b`: the frozen product alone.
        weight, bias, lora_b, scaling, weight_scale, groups, quantize_input: as in `lora_linear`.

    Gradients reach h, bias, s, lora_b and a floating weight.

    >>> linear_lowrank(torch.ones(1, 2), torch.eye(2), None, torch.full((1, 1), 2.0), torch.ones(2, 1), scaling=0.5)
    tensor([[2., 2.]])
    """
    q = scale = None
    if isinstance(h, QuantizedRows):
        (h, q, scale), quantize_input = h, True
    check(h, weight, bias, None, lora_b, weight_scale, groups, quantize_input)
    if (s is None) != (lora_b is None):
        raise ValueError("s and lora_b go together: give both or neither")
    if s is not None and s.shape != (*h.shape[:-1], groups * lora_b.shape[1]):
        raise ValueError(
            f"s must be {[*h.shape[:-1], groups * lora_b.shape[1]]} (the rows of h, groups * r), not {tuple(s.shape)}"
        )
    h = backend.in_autocast_dtype(h)
    s = None if s is None else s.to(h.dtype)
    operands = (h, weight, bias, s, lora_b, scaling, weight_scale, groups, quantize_input)
    if backend.resolve(h, weight, bias, s, lora_b, weight_scale) == "reference":
        return linear_lowrank_reference(*operands)
    return _linear_lowrank(*operands, q, scale)
