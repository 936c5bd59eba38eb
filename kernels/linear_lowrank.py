"""A frozen linear layer plus a low-rank product whose left factor is given.

    y = h W^T + b + s S B^T

h [M, K], W [N, K] (floating, or int8 with scales [N]), b [N], S [M, groups * r], B [N, r], s a number; M counts all
leading dimensions of h. With `groups` projections side by side (q, k, v), those of group g use block g of S: B is
block-diagonal and only its diagonal is stored. The first group may be `lead` times as wide as each other (q has more
heads than k and v): N = (groups + lead - 1) * width. The backward is in linear_backward.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, products
from .backend import cast, jit, tl
from .chunks import chunk_buffer, flat, row_chunks
from .linear_backward import as_float, gradients, group_widths, save
from .quantize import TINY, QuantizedRows, dequantize_rows_reference, launch_quantize_rows, quantize_rows_aten
from .tiling import accumulator, check_rows, dot_precision, gemm_tile, group_of, rank_tile, tile_index


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


def linear_lowrank_reference(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input):
    """h [..., K], s [..., groups * r] -> [..., N]"""
    y = frozen_linear_reference(h, weight, bias, weight_scale, quantize_input)
    if lora_b is None:
        return y
    blocks = lora_b.to(h.dtype).split(group_widths(len(lora_b), groups, lead))
    return y + scaling * torch.cat([F.linear(*own) for own in zip(s.chunk(groups, -1), blocks, strict=True)], -1)


# -------------------------------------------------------------------------------------------------------------- Triton
@jit(varying=("M",))
def linear_lowrank_forward(
    H,  # [M, K], int8 if HS is given
    HS,  # [M] fp32 scales of H's rows, or None
    W,  # [N, K], rows PITCH apart; int8 if WS is given
    WS,  # [N] fp32 scales of W's rows, or None
    BIAS,  # [N] or None
    S,  # [M, GROUPS * R] or None
    B,  # [N, R]
    RESIDUAL,  # [M, N] or None
    Y,  # [M, N]
    scaling,
    M,
    WIDTH,  # N / (GROUPS + LEAD - 1)
    K,
    PITCH,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAD: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides K
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """The low-rank product and the bias are the last steps of the GEMM. A tile of columns lies within a block of WIDTH.

    Rows and columns past the end read the first ones and are not stored: the loop then needs no mask but K's.
    """
    BLOCKS: tl.constexpr = GROUPS + LEAD - 1
    tiles = tl.cdiv(WIDTH, BN)
    pm, pn = tile_index(tl.program_id(0), tl.cdiv(M, BM), BLOCKS * tiles)
    block = pn // tiles
    group = group_of(block, LEAD)
    rm = pm * BM + tl.arange(0, BM)
    column = (pn % tiles) * BN + tl.arange(0, BN)
    rn = block * WIDTH + column
    rk = tl.arange(0, BK)
    mok = rm < M
    nok = column < WIDTH
    hp = H + (rm % M)[:, None].to(tl.int64) * K + rk[None, :]
    wp = W + (block * WIDTH + column % WIDTH)[None, :] * PITCH + rk[:, None]
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        if EVEN:  # without a mask these loads are copied asynchronously, 16 bytes each
            h = tl.load(hp)
            w = tl.load(wp)
        else:
            h = tl.load(hp, mask=(rk < K - k)[None, :], other=0)
            w = tl.load(wp, mask=(rk < K - k)[:, None], other=0)
        acc = tl.dot(h, w.to(h.dtype), acc, out_dtype=ACC, input_precision=PRECISION)  # int8 -> bf16 is exact
        hp += BK
        wp += BK
    y = acc.to(WIDE)
    # int8: one scale a row and one a column, before anything that is not int8 joins
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
            y = tl.dot(s, (b.to(WIDE) * scaling).to(s.dtype), y, out_dtype=WIDE, input_precision=PRECISION)
    if BIAS is not None:
        y += tl.load(BIAS + rn, mask=nok, other=0.0).to(WIDE)[None, :]
    at, mask = rm[:, None].to(tl.int64) * (BLOCKS * WIDTH) + rn[None, :], mok[:, None] & nok[None, :]
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + at, mask=mask, other=0.0).to(WIDE)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


def linear_lowrank_triton(
    h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input, q, scale, residual=None
):
    """h [..., K], s [..., groups * r] or None -> [..., N]; q [..., K] and scale [M]: h, quantised already.

    A residual [..., N] is added before anything is rounded.
    """
    if lora_b is None and weight_scale is None:  # nothing to fuse: the library's GEMM
        low = s, lora_b, scaling, weight_scale, groups, lead
        y = linear_lowrank_aten(h, weight, bias, *low, quantize_input, q, scale)
        return y if residual is None else y.add_(residual)
    rows, dtype = flat(h), h.dtype
    (m, k), n, r = rows.shape, weight.shape[0], 0 if lora_b is None else lora_b.shape[1]
    check_rows(m)
    y, h_scale = h.new_empty(m, n), None
    if quantize_input:
        rows, h_scale = launch_quantize_rows(rows) if q is None else (flat(q), scale)
    rows, h_scale, weight_scale = backend.contiguous(rows, h_scale, weight_scale)
    if weight.stride(1) != 1 or n * weight.stride(0) >= 2**31:  # a joined one has room between its rows
        weight = weight.contiguous()
    bias, s, lora_b, residual = backend.contiguous(bias, flat(s), lora_b, flat(residual))
    tile, blocks = gemm_tile(rows.dtype), groups + lead - 1
    backend.launch(
        linear_lowrank_forward,
        (-(-m // tile["BM"]) * blocks * -(-n // blocks // tile["BN"]),),
        H=rows,
        HS=h_scale,
        W=weight,
        WS=weight_scale,
        BIAS=bias,
        S=s,
        B=lora_b,
        RESIDUAL=residual,
        Y=y,
        scaling=scaling,
        M=m,
        WIDTH=n // blocks,
        K=k,
        PITCH=weight.stride(0),
        R=r,
        GROUPS=groups,
        LEAD=lead,
        ACC=accumulator(rows.dtype),
        WIDE=accumulator(dtype),
        PRECISION=dot_precision(dtype),
        EVEN=k % tile["BK"] == 0,
        BR=rank_tile(r),
        **tile,
    )
    return shaped(y, h)


# ---------------------------------------------------------------------------------------------------------------- ATen
def int8_product(h: Tensor, weight: Tensor) -> Tensor:
    """h [M, K] int8, weight [N, K] int8 -> [M, N] int32. On a GPU ATen wants more than 16 rows and multiples of 8."""
    h, weight = backend.contiguous(h, weight)  # rows of stride 0 are read past their end
    if h.device.type == "cpu" and not torch.cpu._is_vnni_supported():
        return products.int8_mm(h, weight.t())
    if h.device.type == "cpu":
        return torch._int_mm(h, weight.t())
    (m, k), n = h.shape, weight.shape[0]
    h = F.pad(h, (0, -k % 8, 0, max(0, 17 - m)))
    return torch._int_mm(h, F.pad(weight, (0, -k % 8, 0, -n % 8)).t())[:m, :n]


def linear_int8(q, h_scale, weight, bias, weight_scale, dtype):
    """q [M, K] int8 times weight [N, K] int8 -> [M, N] in `dtype`; scales and bias while a chunk is in cache."""
    product, wide = int8_product(q, weight), backend.wide(dtype)
    y, h_scale, weight_scale = q.new_empty(product.shape, dtype=dtype), h_scale.to(wide), weight_scale.to(wide)
    bias, chunks = None if bias is None else bias.to(wide), row_chunks(product)
    buffer = chunk_buffer(product, chunks, wide)
    for s in chunks:
        part = buffer[: len(product[s])].copy_(product[s]).mul_(h_scale[s, None])
        y[s] = part.mul_(weight_scale) if bias is None else torch.addcmul(bias, part, weight_scale, out=part)
    return y


def linear_lowrank_aten(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input, q, scale):
    """As `linear_lowrank_triton`; the low-rank products are added in place."""
    rows = flat(h)
    if quantize_input:
        q, scale = quantize_rows_aten(rows) if q is None else (flat(q), scale)
        y = linear_int8(q, scale, weight, bias, weight_scale, h.dtype)
    else:
        bias = None if bias is None else cast(bias, h.dtype)
        y = products.linear(rows, as_float(weight, weight_scale, h.dtype), bias)
    if lora_b is not None:
        add_lowrank(y, flat(s), cast(lora_b, y.dtype), scaling, groups, lead)
    return shaped(y, h)


def shaped(y, h):
    """y [M, N] -> [..., N], as h lies. For autograd no view: rotary positions are written over what a product gave."""
    return y if h.dim() == 2 else torch.ops.aten._unsafe_view(y, (*h.shape[:-1], y.shape[1]))


def add_lowrank(y, s, lora_b, scaling, groups, lead):
    """y [M, N] += scaling * s B^T, block by block: s [M, groups * r], B = lora_b [N, r]."""
    if groups == 1:
        products.addmm_(y, s, lora_b.t(), scaling)
        return
    width, r = group_widths(y.shape[1], groups, lead)[-1], lora_b.shape[1]
    low, blocks = s.view(s.shape[0], groups, r).transpose(0, 1), groups + lead - 1
    if lead > 1:  # the first group is several blocks
        low = torch.cat([low[:1].expand(lead, -1, -1), low[1:]])  # [blocks, M, r]
    parts = y.as_strided((blocks, y.shape[0], width), (width, y.stride(0), 1))  # a graph cannot write to views of views
    b = lora_b.view(blocks, width, r).transpose(1, 2)
    products.baddbmm_(parts, low, b, scaling)


# -------------------------------------------------------------------------------------------------------- registration
linear_lowrank_op = backend.Op(
    "linear_lowrank(Tensor h, Tensor weight, Tensor? bias, Tensor? s, Tensor? lora_b, float scaling, "
    "Tensor? weight_scale, int groups, int lead, bool quantize_input, Tensor? q, Tensor? scale) -> Tensor",
    aten=linear_lowrank_aten,
    triton=linear_lowrank_triton,
    fake=lambda h, weight, *_: h.new_empty(*h.shape[:-1], weight.shape[0]),
)


class _LinearLowrank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, *rows):
        ctx.scaling, ctx.groups, ctx.lead, ctx.dropout = scaling, groups, lead, 0.0
        save(ctx, h, weight, bias, weight_scale, s, None, lora_b, None)
        return linear_lowrank_op(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, *rows)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        return *gradients(ctx, dy), *[None] * 7


# ------------------------------------------------------------------------------------------------------------- public
def check(x, weight, bias, lora_a, lora_b, weight_scale, groups, lead, quantize_input):
    """Refuse what `linear_lowrank` and `lora_linear` cannot compute."""
    for name, operand in (
        ("the input", x),
        ("bias", bias),
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("weight_scale", weight_scale),
    ):
        if operand is not None and not operand.is_floating_point():
            raise TypeError(f"{name} must be floating, not {operand.dtype}: convert it first")
    int8 = weight.dtype == torch.int8
    if not int8 and not weight.is_floating_point():
        raise TypeError(f"weight must be floating, not {weight.dtype}: convert it first")
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight must be [N, K] for an input [..., K], not {tuple(weight.shape)} for {tuple(x.shape)}")
    n = weight.shape[0]
    if weight.numel() >= 2**31:
        raise ValueError(f"weight {tuple(weight.shape)} has 2**31 elements or more: split it by rows")
    if int8 != (weight_scale is not None):
        raise ValueError(
            f"weight_scale goes with an int8 weight and only with it: weight is {weight.dtype}, "
            f"weight_scale {'missing' if weight_scale is None else 'given'}"
        )
    if quantize_input and not int8:
        raise ValueError(f"int8 rows need an int8 weight, not {weight.dtype}: see quantize_rows")
    for name, vector in (("bias", bias), ("weight_scale", weight_scale)):
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name} must be [{n}] like the weight's rows, not {tuple(vector.shape)}")
    if lora_b is not None and (lora_b.dim() != 2 or lora_b.shape[0] != n or lora_b.shape[1] == 0):
        raise ValueError(f"lora_b must be [{n}, r] like the weight's rows, r at least 1, not {tuple(lora_b.shape)}")
    if groups < 1 or lead < 1 or n % (groups + lead - 1):
        raise ValueError(
            f"groups must divide the weight's {n} rows, the first counting `lead` times, and {groups} "
            f"{'does' if lead == 1 else f'with a lead of {lead} do'} not"
        )


def check_factors(lora_a, lora_b, groups, k):
    """Refuse factors that do not fit each other or an input [..., K]; what `check` says of lora_b holds."""
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b go together: give both or neither")
    if lora_a is not None and lora_a.shape != (groups * lora_b.shape[1], k):
        raise ValueError(f"lora_a must be {[groups * lora_b.shape[1], k]} (groups * r, K), not {tuple(lora_a.shape)}")


def is_plain(x, weight, bias) -> bool:
    """Whether without an adapter autograd's own linear does the same as fast, and keeps no copy in another dtype."""
    alike = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    return alike and not (products.one_by_one(x) or products.is_onednns(x, weight.shape[0]))


def linear_lowrank(
    h: Tensor | QuantizedRows,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    weight_scale: Tensor | None = None,
    groups: int = 1,
    lead: int = 1,
    quantize_input: bool = False,
) -> Tensor:
    """`lora_linear` with S given: `h W^T + b + scaling S B^T`, [..., N] in the dtype of h or of autocast.

    Args:
        h: [..., K]; not kept for backward unless the weight is trained. Or int8 rows, from the pass that wrote h
            (`assemble_norm_project(quantize=True)`), for an int8 weight.
        weight: [N, K], floating, or int8 with `weight_scale` (w = int8 * scale).
        bias: [N] or None.
        s: [..., groups * r], h A^T without the scaling; None together with `lora_b`: the frozen product alone.
        lora_b: [N, r]; group g of its rows uses block g of the columns of `s`.
        scaling: multiplies the low-rank product.
        weight_scale: [N] fp32.
        groups: projections side by side in N, 3 for q, k, v.
        lead: how many times as wide as each other the first of them is.
        quantize_input: multiply int8 rows of h by the int8 weight (W8A8); the backward dequantises the weight.

    Gradients reach h, bias, s, lora_b and a floating weight.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit together.

    >>> linear_lowrank(torch.ones(1, 2), torch.eye(2), None, torch.full((1, 1), 2.0), torch.ones(2, 1), scaling=0.5)
    tensor([[2., 2.]])
    """
    q = scale = None
    if isinstance(h, QuantizedRows):
        (h, q, scale), quantize_input = h, True
    check(h, weight, bias, None, lora_b, weight_scale, groups, lead, quantize_input)
    if (s is None) != (lora_b is None):
        raise ValueError("s and lora_b go together: give both or neither")
    if s is not None and s.shape != (*h.shape[:-1], groups * lora_b.shape[1]):
        raise ValueError(
            f"s must be {[*h.shape[:-1], groups * lora_b.shape[1]]} (the rows of h, groups * r), not {tuple(s.shape)}"
        )
    h = backend.in_autocast_dtype(h)
    s = None if s is None else s.to(h.dtype)
    operands = (h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input)
    if backend.resolve(h, weight, bias, s, lora_b, weight_scale) == "reference":
        return linear_lowrank_reference(*operands)
    if lora_b is None and is_plain(h, weight, bias):
        return products.linear(h, weight, bias)
    run = _LinearLowrank.apply if backend.needs_grad(h, weight, bias, s, lora_b) else linear_lowrank_op
    return run(*operands, q, scale)
