"""The steps of steps_aten.py in Triton kernels, launched without autograd's help."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cast
from .linear_backward import linear_backward_triton
from .linear_lowrank import linear_lowrank_triton
from .norm_joined import joined_backward, joined_forward
from .norm_linear import backward_triton, forward_triton
from .operands import Linear, Norm


def enter_project(x: Tensor, norm: Norm, linear: Linear, dtype: torch.dtype):
    if linear.joined is not None and linear.joined.dtype == dtype:
        return joined_forward(x, norm, linear)
    return forward_triton(x, *norm[:2], *linear[:5], *norm[2:], *linear[5:9], dtype)


def project(h: Tensor, linear: Linear, residual: Tensor | None = None):
    weight, bias, a, b, weight_scale, scaling, groups, lead, int8, _ = linear
    s = None if a is None else F.linear(h, cast(a, h.dtype))
    low = s, b, scaling, weight_scale, groups, lead
    return linear_lowrank_triton(h, weight, bias, *low, int8, None, None, residual), s


def project_backward(dy: Tensor, h: Tensor | None, s: Tensor | None, linear: Linear, apart: bool = False):
    weight, _, a, b, weight_scale, scaling, groups, lead, *_ = linear
    low = None if apart else a
    return linear_backward_triton(dy, h, weight, weight_scale, s, low, b, scaling, groups, lead, 0.0, None, apart)


def enter_project_backward(dy: Tensor, dx: Tensor, kept, norm: Norm, linear: Linear, needs):
    x, mean, rstd, s = kept
    weight, _, a, b, weight_scale, scaling, groups, lead, *_ = linear
    need_x, need_gamma, need_beta, need_a, need_b = needs
    asked = need_x, need_gamma and norm[0] is not None, need_beta and norm[0] is not None, need_a, need_b
    x = x if x is None else cast(x, dx.dtype)
    if linear.joined is not None and linear.joined.dtype == dy.dtype:
        return joined_backward(dy, dx, x, mean, rstd, s, norm, linear, asked)
    low = a, b, weight_scale, s, norm[2], scaling, groups, lead
    return backward_triton(dy, dx, x, mean, rstd, *norm[:2], weight, *low, dx.dtype, asked)
