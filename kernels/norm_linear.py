"""LayerNorm or RMSNorm and the linear layer with LoRA that follows it: the first half of attention and of an MLP.

    h = LayerNorm(x) * norm_weight + norm_bias          x [M, D]; or RMSNorm(x) * norm_weight; without a norm h = x
    s = h A^T                                           A = lora_a [groups * r, D]
    y = h W^T + b + scaling s B^T                       W [N, D] floating, or int8 with scales [N]; B = lora_b [N, r]

What assemble.py and linear_lowrank.py do one after the other, differentiated as one: neither h nor its gradient
outlives the call, and the gradient of a residual connection from x is added where that of the norm is made.

    G  = dY B          dH = dY W + scaling G A          dA = scaling G^T h          dB = scaling dY^T S
    dX = the norm's backward of dH, plus the residual's gradient
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, products
from .assemble import assemble_norm_project
from .assemble_aten import Leaves
from .assemble_backward import backward_triton as assemble_backward_triton
from .assemble_norm_project import forward_triton as assemble_forward_triton
from .backend import cast
from .chunks import flat
from .linear_backward import a_grad, as_float, linear_backward_triton, low_rank_backward
from .linear_lowrank import check, check_factors, linear_lowrank, linear_lowrank_aten, linear_lowrank_triton
from .norm_aten import norm_aten, norm_backward_aten


class Trained(NamedTuple):
    """One entry for each operand of the backward that may train: whether it needs a gradient, or its gradient."""

    x: Any
    norm_weight: Any
    norm_bias: Any
    lora_a: Any
    lora_b: Any


# -------------------------------------------------------------------------------------------------------------- Triton
def forward_triton(
    x, norm_weight, norm_bias, weight, bias, lora_a, lora_b, weight_scale, eps, rms, scaling, groups, lead, int8, dtype
):
    """As `forward_aten`, in two launches at most."""
    if norm_weight is None and lora_a is None and not int8:  # no pass over the rows has anything to write
        frozen = cast(x, dtype), weight, bias, None, None, scaling, weight_scale, groups, lead, int8, None, None
        return linear_lowrank_triton(*frozen), None, None, None
    norm, learned = (norm_weight, norm_bias, lora_a, eps, rms, dtype, int8), (None,) * 4
    _, h, s, mean, rstd, q, scale = assemble_forward_triton(x[None], *learned, *norm)
    h, s = cast(x, dtype) if h is None else h[0], None if s is None else s[0]  # of int8 rows h is the shape alone
    y = linear_lowrank_triton(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, int8, q, scale)
    return y, s, *(None if t is None else t[:, None] for t in (mean, rstd))


def backward_triton(
    dy, d_x, x, mean, rstd, norm_weight, norm_bias, weight, lora_a, lora_b, weight_scale, s, eps, scaling, groups,
    lead, dtype, needs,
):  # fmt: skip
    """As `backward_aten`."""
    needs = Trained(*needs)
    through_norm = any(needs[:3])
    wants_ds = lora_a is not None and (through_norm or needs.lora_a)
    operands = dy, None, weight if through_norm else None, weight_scale, s, lora_a, lora_b
    dh, ds, _, db = linear_backward_triton(*operands, scaling, groups, lead, 0.0, None, wants_ds)
    if not any(needs[:4]):
        return Trained(None, None, None, None, db)
    rows = (None if t is None else t[None] for t in (d_x, dh, ds, x))
    asked = Leaves(needs.x, False, False, False, needs.norm_weight, needs.norm_bias, needs.lora_a)
    norm = mean, rstd, norm_weight, norm_bias, None, None  # ds A is part of dh already; ds makes dA alone
    grads = assemble_backward_triton(*rows, *norm, 1, 0, dy.shape[0], eps, dtype, asked)
    of_parameters = (grads.norm_weight, norm_weight), (grads.norm_bias, norm_bias), (grads.lora_a, lora_a)
    of_parameters = [g if g is None else cast(g, p.dtype) for g, p in of_parameters]
    return Trained(None if grads.tokens is None else grads.tokens[0], *of_parameters, db)


# ---------------------------------------------------------------------------------------------------------------- ATen
def forward_aten(
    x, norm_weight, norm_bias, weight, bias, lora_a, lora_b, weight_scale, eps, rms, scaling, groups, lead, int8, dtype
):
    """y [M, N]; for backward S [M, groups * r], mean (None: RMSNorm) and rstd [M, 1]."""
    h, s, mean, rstd = x, None, None, None
    if norm_weight is not None:
        h, mean, rstd = norm_aten(x, norm_weight, norm_bias, eps, rms)
    h = cast(h, dtype)
    if lora_a is not None:
        s = products.linear(h, cast(lora_a, dtype))
    y = linear_lowrank_aten(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, int8, None, None)
    return y, s, mean, rstd


def backward_aten(
    dy, d_x, x, mean, rstd, norm_weight, norm_bias, weight, lora_a, lora_b, weight_scale, s, eps, scaling, groups,
    lead, dtype, needs,
):  # fmt: skip
    """`Trained`, the gradients that `needs` asks for. d_x: the residual's gradient of x. No mean: RMSNorm."""
    need_x, need_gamma, need_beta, need_a, need_b = needs
    through_norm, g, dh, d_gamma, d_beta, d_a, d_b = need_x or need_gamma or need_beta, *[None] * 6
    if lora_b is not None:
        wants_g = through_norm or need_a
        g, d_b = low_rank_backward(dy, s if need_b else None, lora_b, scaling, groups, lead, wants_g)
    if through_norm:
        dh = products.through(dy, as_float(weight, weight_scale, dy.dtype))
        if g is not None:
            products.addmm_(dh, g, cast(lora_a, dy.dtype), scaling)
    if need_a:
        h = x if norm_weight is None else norm_aten(x, norm_weight, norm_bias, eps, mean is None)[0]
        d_a = a_grad(g, cast(h, dy.dtype), lora_a, scaling)
    if norm_weight is not None and through_norm:
        mask = [need_x, need_gamma, need_beta]
        dh, d_gamma, d_beta = norm_backward_aten(dh, x, mean, rstd, norm_weight, norm_bias, mask)
        d_gamma = cast(d_gamma, norm_weight.dtype) if need_gamma else None
        d_beta = cast(d_beta, norm_bias.dtype) if need_beta else None
    if need_x:
        dh = cast(dh, dtype)
        dh = dh if d_x is None else dh.add_(d_x)
    return Trained(dh if need_x else None, d_gamma, d_beta, d_a, d_b)


# -------------------------------------------------------------------------------------------------------- registration
def _fake(x, norm_weight, norm_bias, weight, bias, lora_a, *rest):
    rms, dtype, rows = rest[3], rest[-1], x.shape[0]
    s = None if lora_a is None else x.new_empty(rows, lora_a.shape[0], dtype=dtype)
    mean, rstd = (x.new_empty(rows, 1, dtype=backend.wide(x.dtype)) for _ in range(2))
    statistics = (None, None) if norm_weight is None else (None if rms else mean, rstd)
    return x.new_empty(rows, weight.shape[0], dtype=dtype), s, *statistics


def _fake_backward(dy, d_x, x, mean, rstd, norm_weight, norm_bias, weight, lora_a, lora_b, *rest):
    dtype, needs = rest[-2], Trained(*rest[-1])
    return (
        dy.new_empty(dy.shape[0], weight.shape[1], dtype=dtype) if needs.x else None,
        norm_weight.new_empty(norm_weight.shape) if needs.norm_weight else None,
        norm_bias.new_empty(norm_bias.shape) if needs.norm_bias else None,
        lora_a.new_empty(lora_a.shape) if needs.lora_a else None,
        lora_b.new_empty(lora_b.shape) if needs.lora_b else None,
    )


norm_linear_forward = backend.Op(
    "norm_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias, Tensor? lora_a, "
    "Tensor? lora_b, Tensor? weight_scale, float eps, bool rms, float scaling, int groups, int lead, bool int8, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    aten=forward_aten,
    triton=forward_triton,
    fake=_fake,
)
norm_linear_backward = backend.Op(
    "norm_linear_backward(Tensor dy, Tensor? d_x, Tensor? x, Tensor? mean, Tensor? rstd, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor? weight_scale, Tensor? s, float eps, "
    "float scaling, int groups, int lead, ScalarType dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    aten=backward_aten,
    triton=backward_triton,
    fake=_fake_backward,
)


class _NormLinear(torch.autograd.Function):
    """(y [M, N], x [M, D] for the residual)"""

    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight,
        norm_bias,
        weight,
        bias,
        lora_a,
        lora_b,
        weight_scale,
        eps,
        rms,
        scaling,
        groups,
        lead,
        int8,
        dtype,
    ):
        frozen = weight, bias, lora_a, lora_b, weight_scale
        options = eps, rms, scaling, groups, lead, int8, dtype
        y, s, mean, rstd = norm_linear_forward(x, norm_weight, norm_bias, *frozen, *options)
        ctx.set_materialize_grads(False)
        need_x, need_gamma, need_beta, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.needs = need_x, need_gamma, need_beta, need_a, need_b
        ctx.eps, ctx.scaling, ctx.groups, ctx.lead, ctx.dtype = eps, scaling, groups, lead, x.dtype
        kept = None
        if norm_weight is not None or need_a:  # under autocast as narrow as what is computed from it
            kept = x if x.dtype.itemsize <= dtype.itemsize else x.to(dtype)
        saved = weight, lora_a, lora_b, weight_scale, s if need_b else None, bias
        ctx.save_for_backward(kept, mean, rstd, norm_weight, norm_bias, *saved)
        return y, x.view_as(x)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy, d_x):
        if dy is None:
            return d_x, *[None] * 14
        kept, mean, rstd, norm_weight, norm_bias, weight, lora_a, lora_b, weight_scale, s, bias = ctx.saved_tensors
        x = None if kept is None else cast(kept, ctx.dtype)
        norm, low = (mean, rstd, norm_weight, norm_bias), (lora_a, lora_b, weight_scale, s)
        options = ctx.eps, ctx.scaling, ctx.groups, ctx.lead, ctx.dtype, ctx.needs
        dx, d_gamma, d_beta, d_a, d_b = norm_linear_backward(dy, d_x, x, *norm, weight, *low, *options)
        d_bias = dy.sum(0, dtype=bias.dtype) if ctx.needs_input_grad[4] else None
        return dx, d_gamma, d_beta, None, d_bias, d_a, d_b, *[None] * 8


# -------------------------------------------------------------------------------------------------------------- public
def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    weight_scale: Tensor | None = None,
    groups: int = 1,
    lead: int = 1,
    quantize_input: bool = False,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm and a linear layer with LoRA.

    Args:
        x: [B, T, D].
        norm_weight: [D]; None: no norm.
        norm_bias: [D] or None.
        eps: added to the variance.
        weight: [N, D], frozen: floating, or int8 with `weight_scale`.
        bias: [N] or None.
        lora_a: [groups * r, D]; None together with `lora_b` leaves the frozen linear alone.
        lora_b: [N, r]; group g of its rows uses block g of the rows of `lora_a`.
        scaling: multiplies the low-rank product.
        weight_scale: [N] fp32.
        groups: projections side by side in N, 3 for q, k, v.
        lead: how many times as wide as each other the first of them is.
        quantize_input: multiply int8 rows of h by the int8 weight (W8A8).
        rms: RMSNorm, which has no `norm_bias`.

    Returns:
        y [B, T, N] in the dtype of x (of autocast under autocast), and x for the residual connection: taken from
        here, its gradient costs no pass of its own.

    Gradients reach x, norm_weight, norm_bias, bias, lora_a and lora_b; a weight that trains costs a pass more.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit together.

    >>> x = torch.tensor([[[1.0, 3.0]]])
    >>> norm_linear(x, torch.ones(2), None, 0.0, torch.eye(2), None, None, None, 1.0)[0]
    tensor([[[-1.,  1.]]])
    """
    chosen = backend.resolve(x, norm_weight, norm_bias, weight, bias, lora_a, lora_b, weight_scale)
    if chosen == "reference" or weight.requires_grad:
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps, "rms": rms, "lora_a": lora_a}
        h, s, rows = assemble_norm_project(tokens=x, **norm, quantize=quantize_input)
        return linear_lowrank(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input), rows
    check(x, weight, bias, lora_a, lora_b, weight_scale, groups, lead, quantize_input)
    check_factors(lora_a, lora_b, groups, x.shape[-1])
    _check_norm(x, norm_weight, norm_bias)
    frozen = weight, bias, lora_a, lora_b, weight_scale
    options = eps, rms, scaling, groups, lead, quantize_input, backend.compute_dtype(x)
    if backend.needs_grad(x, norm_weight, norm_bias, bias, lora_a, lora_b):
        y, rows = _NormLinear.apply(flat(x), norm_weight, norm_bias, *frozen, *options)
        x = rows.view(x.shape)
    else:
        y = norm_linear_forward(flat(x), norm_weight, norm_bias, *frozen, *options)[0]
    return y.view(*x.shape[:-1], y.shape[1]), x


def _check_norm(x, norm_weight, norm_bias):
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], not {list(x.shape)}")
    if norm_weight is None and norm_bias is not None:
        raise ValueError("norm_bias was given without norm_weight: give both, or neither to skip the norm")
    width = x.shape[2:]
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and (vector.shape != width or not vector.is_floating_point()):
            given = f"{vector.dtype} {list(vector.shape)}"
            raise ValueError(f"{name} must be floating point {list(width)} to fit x, not {given}")
