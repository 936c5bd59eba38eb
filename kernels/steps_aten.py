"""The steps of half a transformer block in ATen calls, for attention_half.py and mlp_half.py.

    enter_project    y, S = linear(norm(x))    project    y, S = linear(h) + residual    h [M, K], y [M, N], S = h A^T

Straight-line code: on a small batch, a call of Python costs as much as an op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import products
from .backend import cast
from .linear_backward import a_grad, as_float, low_rank_backward
from .linear_lowrank import add_lowrank, linear_lowrank_aten
from .norm_aten import norm_aten, norm_backward_aten
from .operands import Linear, Norm


def enter_project(x: Tensor, norm: Norm, linear: Linear, dtype: torch.dtype):
    """(y, S) as `project` gives them, computed in `dtype`; mean (None: RMSNorm) and rstd, None without a norm."""
    if norm[0] is None:
        return *project(cast(x, dtype), linear), None, None
    h, mean, rstd = norm_aten(x, *norm)
    return *project(cast(h, dtype), linear), mean, rstd


def project(h: Tensor, linear: Linear, residual: Tensor | None = None):
    """y, and S [M, groups * r], None without an adapter. A residual has the dtype of h."""
    weight, bias, a, b, weight_scale, scaling, groups, lead, int8, _ = linear
    if weight.dtype == h.dtype and (bias is None or bias.dtype == h.dtype):
        y = products.linear(h, weight, bias)
    else:
        y = linear_lowrank_aten(h, weight, bias, None, None, 1.0, weight_scale, 1, 1, int8, None, None)
    s = None
    if a is not None:
        s = products.linear(h, cast(a, h.dtype))
        add_lowrank(y, s, cast(b, h.dtype), scaling, groups, lead)
    return y if residual is None else y.add_(residual), s


def project_backward(dy: Tensor, h: Tensor | None, s: Tensor | None, linear: Linear, apart: bool = False):
    """dH, dS, dA and dB. h and s: None where dA and dB are not asked for; `apart`: dS is not part of dH yet."""
    weight, _, a, b, weight_scale, scaling, groups, lead, *_ = linear
    dh = products.through(dy, weight if weight.dtype == dy.dtype else as_float(weight, weight_scale, dy.dtype))
    if b is None:
        return dh, None, None, None
    g, d_b = low_rank_backward(dy, s, b, scaling, groups, lead)
    if apart:
        return dh, g.mul_(scaling), None, d_b
    products.addmm_(dh, g, cast(a, g.dtype), scaling)
    return dh, None, None if h is None else a_grad(g, h, a, scaling), d_b


def enter_project_backward(dy: Tensor, dx: Tensor, kept, norm: Norm, linear: Linear, needs):
    """Gradients of x, of the norm's weight and bias, of A and B. dx: the residual's of x, which joins its own.

    Args:
        kept: x (None where no gradient needs it), mean, 1 / standard deviation and S.
        needs: which of the five are asked for; without a norm, neither weight nor bias is its own.
    """
    x, mean, rstd, s = kept
    need_x, need_gamma, need_beta, need_a, need_b = needs
    x = x if x is None or x.dtype == dx.dtype else x.to(dx.dtype)
    h = None
    if need_a:
        h = cast(x if norm[0] is None else norm_aten(x, *norm)[0], dy.dtype)
    dh, _, d_a, d_b = project_backward(dy, h, s if need_b else None, linear)
    d_gamma = d_beta = None
    if norm[0] is not None:
        mask = [need_x, need_gamma, need_beta]
        dh, d_gamma, d_beta = norm_backward_aten(dh, x, mean, rstd, norm[0], norm[1], mask)
        d_gamma = cast(d_gamma, norm[0].dtype) if need_gamma else None
        d_beta = cast(d_beta, norm[1].dtype) if need_beta else None
    return cast(dh, dx.dtype).add_(dx) if need_x else None, d_gamma, d_beta, d_a, d_b
