"""The activation of a gated MLP: gate and up projection come side by side out of one product.

    y = act(gate) * up                              h = [gate, up] [M, 2 F], y [M, F]
    d_gate = act'(gate) * dY * up,  d_up = dY * act(gate)           dH = [d_gate, d_up]

Backward needs h alone: act(gate) is computed again. On Triton either way is one pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .activations import ACTIVATIONS, activate
from .backend import jit, tl
from .chunks import flat, row_chunks_by_core
from .tiling import accumulator, check_rows

TILE = {"BM": 4, "BF": 512, "num_warps": 4}


# ------------------------------------------------------------------------------------------------------------ reference
def _reference(h: Tensor, activation: str) -> Tensor:
    gate, up = h.chunk(2, -1)
    return ACTIVATIONS[activation][0](gate) * up


# --------------------------------------------------------------------------------------------------------------- Triton
@jit(varying=("M",))
def gated_forward_kernel(
    H,  # [M, 2 F]
    Y,  # [M, F]
    M,
    F,
    PITCH,  # from one row of H to the next
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
):
    """A program owns BM rows and BF columns of Y."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rf = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (rm < M)[:, None] & (rf < F)[None, :]
    row = rm[:, None].to(tl.int64)
    at = H + row * PITCH + rf[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(ACC)
    up = tl.load(at + F, mask=mask, other=0.0).to(ACC)
    hidden, _ = activate(gate, ACTIVATION)
    tl.store(Y + row * F + rf[None, :], (hidden * up).to(Y.dtype.element_ty), mask=mask)


@jit(varying=("M",))
def gated_backward_kernel(
    D_Y,  # [M, F]
    H,  # [M, 2 F]
    D_H,  # [M, 2 F]
    M,
    F,
    PITCH,  # from one row of H to the next
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
):
    """As forward: a program owns BM rows, and BF columns of either half of D_H."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rf = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (rm < M)[:, None] & (rf < F)[None, :]
    row = rm[:, None].to(tl.int64)
    at = H + row * PITCH + rf[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(ACC)
    up = tl.load(at + F, mask=mask, other=0.0).to(ACC)
    dy = tl.load(D_Y + row * F + rf[None, :], mask=mask, other=0.0).to(ACC)
    hidden, slope = activate(gate, ACTIVATION)
    to = D_H + row * 2 * F + rf[None, :]
    tl.store(to, (dy * up * slope).to(D_H.dtype.element_ty), mask=mask)
    tl.store(to + F, (dy * hidden).to(D_H.dtype.element_ty), mask=mask)


def _rows_of(h: Tensor) -> Tensor:
    """[M, 2 F] with any distance between rows, none between columns."""
    rows = flat(h)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch(kernel, h: Tensor, activation: str, **tensors: Tensor) -> None:
    m, f = h.shape[0], h.shape[1] // 2
    check_rows(m)
    backend.launch(
        kernel,
        (-(-m // TILE["BM"]), -(-f // TILE["BF"])),
        **tensors,
        M=m,
        F=f,
        PITCH=h.stride(0),
        ACTIVATION=activation,
        ACC=accumulator(h.dtype),
        **TILE,
    )


def forward_triton(h: Tensor, activation: str) -> Tensor:
    """y [..., F]"""
    rows, y = _rows_of(h), h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
    _launch(gated_forward_kernel, rows, activation, H=rows, Y=y)
    return y


def backward_triton(dy: Tensor, h: Tensor, activation: str) -> Tensor:
    """d_h [..., 2 F]"""
    rows, d_h = _rows_of(h), h.new_empty(h.shape)
    _launch(gated_backward_kernel, rows, activation, D_Y=dy.contiguous(), H=rows, D_H=d_h)
    return d_h


# ----------------------------------------------------------------------------------------------------------------- ATen
def forward_aten(h: Tensor, activation: str) -> Tensor:
    """y [..., F]"""
    gate, up = h.chunk(2, -1)
    return ACTIVATIONS[activation][0](gate).mul_(up).contiguous()


def backward_aten(dy: Tensor, h: Tensor, activation: str) -> Tensor:
    """d_h [..., 2 F]"""
    act, act_backward = ACTIVATIONS[activation]
    rows, dy, d_h = flat(h), flat(dy), h.new_empty(h.shape)
    (gate, up), (d_gate, d_up) = (t.chunk(2, 1) for t in (rows, d_h.view(rows.shape)))
    for s in row_chunks_by_core(dy):
        torch.mul(dy[s], act(gate[s]), out=d_up[s])
        d_gate[s] = act_backward(dy[s] * up[s], gate[s])
    return d_h


# -------------------------------------------------------------------------------------------------------- registration
gated_forward = backend.Op(
    "gated(Tensor h, str activation) -> Tensor",
    aten=forward_aten,
    triton=forward_triton,
    fake=lambda h, activation: h.new_empty(*h.shape[:-1], h.shape[-1] // 2),
)
gated_backward = backend.Op(
    "gated_backward(Tensor dy, Tensor h, str activation) -> Tensor",
    aten=backward_aten,
    triton=backward_triton,
    fake=lambda dy, h, activation: h.new_empty(h.shape),
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, activation):
        ctx.activation = activation
        ctx.save_for_backward(h)
        return gated_forward(h, activation)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        return gated_backward(dy, *ctx.saved_tensors, ctx.activation), None


# --------------------------------------------------------------------------------------------------------------- public
def gated(h: Tensor, activation: str) -> Tensor:
    """The activated gate times the up projection; backward keeps h alone.

    Args:
        h: [..., 2 F], the gate's F columns, then those of the up projection.
        activation: of the gate; a name in `activations.ACTIVATIONS`.

    Returns:
        [..., F] in the dtype of h.

    Raises:
        ValueError: an odd width, integers, or an unknown activation.

    >>> gated(torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), "relu")
    tensor([[0., 8.]])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if h.dim() == 0 or h.shape[-1] % 2 or not h.is_floating_point():
        raise ValueError(f"h must be floating [..., 2 F], gate and up side by side, not {h.dtype} {list(h.shape)}")
    if backend.resolve(h) == "reference":
        return _reference(h, activation)
    return _Gated.apply(h, activation) if backend.needs_grad(h) else gated_forward(h, activation)
