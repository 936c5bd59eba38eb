"""Rotary positions, and QK-norm before them, in place on the rows that hold q and k (and what lies behind them).

    n = x / sqrt(mean(x^2) + eps) * weight          x [Dh]: one head of a row, with a weight of its own; or n = x
    y = [n1 cos - n2 sin, n2 cos + n1 sin]          n = [n1, n2], cos and sin [Dh / 2] of the row

The first `heads` heads of rows [N, C] are changed, the rest of a row is not read. cos = 1, sin = 0 leave a row where it
is. This is Hugging Face's `rotate_half`, whose cos and sin hold ours twice. Arithmetic is fp32 (fp64 for fp64) and
rounded once; weight, cos and sin are frozen.

    [dn1, dn2] = [dy1 cos + dy2 sin, dy2 cos - dy1 sin]
    dx = (g - xhat mean(g xhat)) / sqrt(mean(x^2) + eps)            g = dn weight, xhat = x / sqrt(mean(x^2) + eps)

Backward of the rotation needs cos and sin alone; that of QK-norm keeps x, [N, heads * Dh].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta
from torch._C._autograd import _get_creation_meta as creation_meta

from . import backend
from .backend import cast, jit, tl
from .chunks import row_chunks_by_core
from .tiling import accumulator, check_rows

TILE_ELEMENTS = 1024  # of half a head, in BM rows: 16 bytes of bf16 for each of 128 threads


# ------------------------------------------------------------------------------------------------------------ reference
def _reference(rows, heads, cos, sin, weight, eps):
    x = rows[:, : heads * _width(cos, weight)].unflatten(1, (heads, -1)).to(backend.wide(rows.dtype))
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(2, keepdim=True) + eps) * weight
    if cos is not None:
        first, second = x.chunk(2, 2)
        cos, sin = cos[:, None], sin[:, None]
        x = torch.cat([first * cos - second * sin, second * cos + first * sin], 2)
    x = x.flatten(1).to(rows.dtype)
    return torch.cat([x, rows[:, x.shape[1] :]], 1)


# --------------------------------------------------------------------------------------------------------------- Triton
@jit(varying=("N",))
def rotary_forward(
    X,  # [N, C], written over
    KEPT,  # [N, HEADS * Dh], what stood there, or None
    COS,  # [N, Dh / 2] or None
    SIN,  # [N, Dh / 2] or None
    WEIGHT,  # [HEADS, Dh] or None
    eps,
    N,
    PITCH,  # from one row of X to the next
    HEADS,
    HALF,  # Dh / 2
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """A program owns BM rows and takes their heads in turn, each as its two halves."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rh = tl.arange(0, BH)
    mask = (rm < N)[:, None] & (rh < HALF)[None, :]
    row = rm[:, None].to(tl.int64)
    if COS is not None:
        cos = tl.load(COS + row * HALF + rh[None, :], mask=mask, other=0.0).to(ACC)
        sin = tl.load(SIN + row * HALF + rh[None, :], mask=mask, other=0.0).to(ACC)
    for head in range(HEADS):
        at = head * 2 * HALF + rh[None, :]
        x = X + row * PITCH + at
        first = tl.load(x, mask=mask, other=0.0)
        second = tl.load(x + HALF, mask=mask, other=0.0)
        if KEPT is not None:
            kept = KEPT + row * HEADS * 2 * HALF + at
            tl.store(kept, first, mask=mask)
            tl.store(kept + HALF, second, mask=mask)
        first, second = first.to(ACC), second.to(ACC)
        if WEIGHT is not None:
            rstd = 1 / tl.sqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)
            first *= rstd[:, None] * tl.load(WEIGHT + at, mask=(rh < HALF)[None, :], other=0.0).to(ACC)
            second *= rstd[:, None] * tl.load(WEIGHT + at + HALF, mask=(rh < HALF)[None, :], other=0.0).to(ACC)
        if COS is not None:
            first, second = first * cos - second * sin, second * cos + first * sin
        tl.store(x, first.to(X.dtype.element_ty), mask=mask)
        tl.store(x + HALF, second.to(X.dtype.element_ty), mask=mask)


@jit(varying=("N",))
def rotary_backward(
    D,  # [N, C], written over
    KEPT,  # [N, HEADS * Dh], with WEIGHT
    COS,  # [N, Dh / 2] or None
    SIN,  # [N, Dh / 2] or None
    WEIGHT,  # [HEADS, Dh] or None
    eps,
    N,
    PITCH,  # from one row of D to the next
    HEADS,
    HALF,  # Dh / 2
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """As forward: a program owns BM rows and takes their heads in turn."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rh = tl.arange(0, BH)
    mask = (rm < N)[:, None] & (rh < HALF)[None, :]
    row = rm[:, None].to(tl.int64)
    if COS is not None:
        cos = tl.load(COS + row * HALF + rh[None, :], mask=mask, other=0.0).to(ACC)
        sin = tl.load(SIN + row * HALF + rh[None, :], mask=mask, other=0.0).to(ACC)
    for head in range(HEADS):
        at = head * 2 * HALF + rh[None, :]
        d = D + row * PITCH + at
        first = tl.load(d, mask=mask, other=0.0).to(ACC)
        second = tl.load(d + HALF, mask=mask, other=0.0).to(ACC)
        if COS is not None:
            first, second = first * cos + second * sin, second * cos - first * sin
        if WEIGHT is not None:
            kept = KEPT + row * HEADS * 2 * HALF + at
            x1 = tl.load(kept, mask=mask, other=0.0).to(ACC)
            x2 = tl.load(kept + HALF, mask=mask, other=0.0).to(ACC)
            rstd = 1 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
            x1, x2 = x1 * rstd, x2 * rstd
            first *= tl.load(WEIGHT + at, mask=(rh < HALF)[None, :], other=0.0).to(ACC)
            second *= tl.load(WEIGHT + at + HALF, mask=(rh < HALF)[None, :], other=0.0).to(ACC)
            along = (tl.sum(first * x1 + second * x2, 1) / (2 * HALF))[:, None]
            first, second = (first - x1 * along) * rstd, (second - x2 * along) * rstd
        tl.store(d, first.to(D.dtype.element_ty), mask=mask)
        tl.store(d + HALF, second.to(D.dtype.element_ty), mask=mask)


def _launch(kernel, rows, kept, heads, cos, sin, weight, eps, **tensors):
    cos, sin, weight, kept = backend.contiguous(cos, sin, weight, kept)
    half = _width(cos, weight) // 2
    tile = 1 << (half - 1).bit_length()
    rows_of_tile = max(1, TILE_ELEMENTS // tile)
    check_rows(rows.shape[0])
    backend.launch(
        kernel,
        (-(-rows.shape[0] // rows_of_tile),),
        **tensors,
        KEPT=kept,
        COS=cos,
        SIN=sin,
        WEIGHT=weight,
        eps=eps,
        N=rows.shape[0],
        PITCH=rows.stride(0),
        HEADS=heads,
        HALF=half,
        ACC=accumulator(rows.dtype),
        BM=rows_of_tile,
        BH=tile,
        num_warps=4,
    )


def _in_place(kernel, name, rows, kept, *operands):
    """The kernel on rows whose columns lie side by side: their own memory if it is so."""
    own = rows if rows.stride(1) == 1 else rows.contiguous()
    _launch(kernel, own, kept, *operands, **{name: own})
    if own is not rows:
        rows.copy_(own)


def forward_triton(rows, heads, cos, sin, weight, eps):
    """Changes `rows`; returns what stood in its heads, [N, heads * Dh], None without a norm."""
    kept = None if weight is None else rows.new_empty(rows.shape[0], weight.numel())
    _in_place(rotary_forward, "X", rows, kept, heads, cos, sin, weight, eps)
    return kept


def backward_triton(d_rows, kept, heads, cos, sin, weight, eps):
    """Changes `d_rows`."""
    _in_place(rotary_backward, "D", d_rows, kept, heads, cos, sin, weight, eps)


# ----------------------------------------------------------------------------------------------------------------- ATen
def _chunks_in_place(rows, heads, cos, sin, weight, change, *kept):
    """`change(x, cos, sin, *kept)` chunk by chunk: x [n, heads, Dh] in the dtype of sums, cos and sin [n, 1, Dh / 2].

    What is narrower passes through a buffer: it is rounded once.
    """
    wide = backend.wide(rows.dtype)
    x = rows[:, : heads * _width(cos, weight)]
    for s in row_chunks_by_core(x):
        own = x[s].unflatten(1, (heads, -1))
        of_rows = (None if t is None else cast(t[s], wide)[:, None] for t in (cos, sin))
        given = cast(own, wide)
        change(given, *of_rows, *(t[s].view(own.shape) for t in kept))
        if given is not own:
            own.copy_(given)


def _turn(x, cos, sin):
    """The rotation, in place: three passes over half of x, two over the other."""
    first, second = x.chunk(2, 2)
    crossed = second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.mul_(cos).sub_(crossed)


def _rstd(x, eps):
    """[n, heads, 1]. Of the ways to add up squares of short rows this is the only one that ATen vectorises."""
    return torch.linalg.vector_norm(x, dim=2, keepdim=True).square_().div_(x.shape[2]).add_(eps).rsqrt_()


def forward_aten(rows, heads, cos, sin, weight, eps):
    """Changes `rows`; returns what stood in its heads, [N, heads * Dh], None without a norm."""

    def change(x, cos, sin):
        if weight is not None:
            x.mul_(_rstd(x, eps)).mul_(weight)
        if cos is not None:
            _turn(x, cos, sin)

    kept = None
    if weight is not None:
        kept = rows[:, : weight.numel()].clone(memory_format=torch.contiguous_format)
        weight = cast(weight, backend.wide(rows.dtype))
    _chunks_in_place(rows, heads, cos, sin, weight, change)
    return kept


def backward_aten(d_rows, kept, heads, cos, sin, weight, eps):
    """Changes `d_rows`."""

    def change(d, cos, sin, *kept):
        if cos is not None:
            _turn(d, cos, -sin)
        if weight is not None:
            x = cast(kept[0], d.dtype)
            rstd = _rstd(x, eps)
            x, d = x * rstd, d.mul_(weight)
            d.addcmul_(x, (x * d).mean(2, keepdim=True), value=-1).mul_(rstd)

    weight = None if weight is None else cast(weight, backend.wide(d_rows.dtype))
    _chunks_in_place(d_rows, heads, cos, sin, weight, change, *(() if weight is None else (kept,)))


# ---------------------------------------------------------------- registration; also for a Function of many steps
OPERANDS = "int heads, Tensor? cos, Tensor? sin, Tensor? weight, float eps"
rotate = backend.Op(
    f"rotary(Tensor(a!) rows, {OPERANDS}) -> Tensor",
    aten=forward_aten,
    triton=forward_triton,
    fake=lambda rows, heads, cos, sin, weight, eps: (
        None if weight is None else rows.new_empty(rows.shape[0], weight.numel())
    ),
)
rotate_backward = backend.Op(
    f"rotary_backward(Tensor(a!) d_rows, Tensor? kept, {OPERANDS}) -> ()",
    aten=backward_aten,
    triton=backward_triton,
    fake=lambda *_: None,
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, heads, cos, sin, weight, eps):
        if torch.compiler.is_compiling():  # before torch 2.13 a graph knows no mark_dirty
            rows = rows.clone()
        else:
            ctx.mark_dirty(rows)
        ctx.heads, ctx.eps = heads, eps
        kept = rotate(rows, heads, cos, sin, weight, eps)
        ctx.save_for_backward(kept, cos, sin, weight)
        return rows

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_rows):
        kept, *frozen = ctx.saved_tensors
        d_rows = d_rows.clone(memory_format=torch.contiguous_format)  # it may be another's as well
        rotate_backward(d_rows, kept, ctx.heads, *frozen, ctx.eps)
        return d_rows, *[None] * 5


# --------------------------------------------------------------------------------------------------------------- public
def rotary(
    rows: Tensor,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate the first heads of each row by its position, after an RMSNorm of each head where there is one.

    Args:
        rows: [N, C], floating: `heads` heads of width Dh, then what stays as it is. Its memory is used for the result,
            where that can be: read what is returned, and no longer `rows`. Not that of a leaf that needs a gradient.
        heads: how many heads, those of q and of k together.
        cos, sin: [N, Dh / 2], of the angles of each row; None: no rotation.
        weight: [heads, Dh], of QK-norm; None: no norm.
        eps: of QK-norm.

    Returns:
        [N, C] in the dtype of `rows`. Gradients reach `rows`; cos, sin and weight are frozen.

    Raises:
        ValueError: shapes that do not fit together, or neither cos and sin nor weight.

    >>> quarter = torch.zeros(1, 1), torch.ones(1, 1)  # cos and sin of 90 degrees
    >>> rotary(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), 2, *quarter)
    tensor([[-2.,  1., -4.,  3.,  9.]])
    """
    _check(rows, heads, cos, sin, weight)
    operands = heads, cos, sin, None if weight is None else weight.detach(), eps
    if backend.resolve(rows, cos, sin, weight) == "reference":
        return _reference(rows, *operands)
    rows = rows if _may_be_written(rows) else rows.clone(memory_format=torch.contiguous_format)
    if backend.needs_grad(rows):
        return _Rotary.apply(rows, *operands)
    rotate(rows, *operands)
    return rows


def _may_be_written(rows: Tensor) -> bool:
    """Not where elements share a place, nor where autograd forbids it: a leaf, and one of several views of one call."""
    if torch.compiler.is_compiling():
        return True  # a graph clones them
    if 0 in rows.stride() and rows.numel() > 1:
        return False
    if not backend.needs_grad(rows):
        return True
    base = rows._base if rows._is_view() else rows
    return not base.is_leaf and (base is rows or creation_meta(rows) == CreationMeta.DEFAULT)


def _width(cos: Tensor | None, weight: Tensor | None) -> int:
    """Dh"""
    return 2 * cos.shape[1] if weight is None else weight.shape[1]


def _check(rows, heads, cos, sin, weight):
    if (cos is None) != (sin is None) or (cos is None and weight is None):
        raise ValueError("rotary takes cos and sin together, or weight, or all three")
    shapes = {n: list(t.shape) for n, t in (("cos", cos), ("sin", sin), ("weight", weight)) if t is not None}
    width = shapes["weight"][-1] if weight is not None else 2 * shapes["cos"][-1]
    expected = {"cos": [rows.shape[0], width // 2], "sin": [rows.shape[0], width // 2], "weight": [heads, width]}
    if rows.dim() != 2 or heads < 1 or not rows.is_floating_point() or rows.shape[1] < heads * width or width % 2:
        raise ValueError(
            f"rows must be floating [N, C] with room for {heads} heads of an even width, "
            f"not {rows.dtype} {list(rows.shape)} for heads of {width}"
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(f"{name} must be {expected[name]} to fit rows, heads and one another, not {shape}")
