"""The MLP half of a transformer block, forward and backward, for transformer_block.py.

    u = fc1(norm(x))          z = norm'(x + scale * fc2(act(u)))          x [M, D], u [M, F]

norm (before), norm' (after) and scale (LayerScale's, [D]) may each be missing. u is kept, act(u) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import cast
from .linear_backward import linear_backward
from .linear_lowrank import linear_lowrank_op
from .norm_linear import norm_linear_backward, norm_linear_forward
from .operands import Half, add_update, add_update_backward, bias_grad, kept_as

aten = torch.ops.aten

# name: (act(u), the gradient of u from that of act(u))
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (F.gelu, lambda d, u: aten.gelu_backward(d, u)),
    "gelu_tanh": (
        lambda u: F.gelu(u, approximate="tanh"),
        lambda d, u: aten.gelu_backward(d, u, approximate="tanh"),
    ),
    "quick_gelu": (lambda u: F.silu(1.702 * u) / 1.702, lambda d, u: aten.silu_backward(d, 1.702 * u)),
    "relu": (F.relu, lambda d, u: aten.threshold_backward(d, u, 0)),
    "silu": (F.silu, lambda d, u: aten.silu_backward(d, u)),
}


def forward(x: Tensor, half: Half, activation: str, dtype: torch.dtype):
    """z [M, D], and what backward needs."""
    norm, fc1, fc2, scale, after = half
    u, s, mean, rstd = norm_linear_forward(x, *norm[:2], *fc1[:5], norm[2], *fc1[5:], dtype)
    hidden = ACTIVATIONS[activation][0](u)
    weight, bias, lora_a, lora_b, weight_scale, scaling, groups, int8 = fc2
    s2 = None if lora_a is None else hidden @ cast(lora_a, dtype).t()
    update = linear_lowrank_op(hidden, weight, bias, s2, lora_b, scaling, weight_scale, groups, int8, None, None)
    z, *ended = add_update(x, update, scale, after)
    kept = kept_as(x, dtype) if norm[0] is not None or fc1[2] is not None else None
    return z, (kept, mean, rstd, s, u, s2, *ended)


def backward(dz, kept, half: Half, activation: str, dtype: torch.dtype, needs):
    """Gradients of x and of what `Half.trained` lists, in its order; those that `needs` asks for."""
    norm, fc1, fc2, scale, after = half
    x, mean, rstd, s, u, s2, *ended = kept
    need_x, need_gamma, need_beta, need_bias, need_a, need_b, need_bias2, need_a2, need_b2 = needs
    dx, d_update, d_after = add_update_backward(dz, *ended, scale, after, u.dtype, need_gamma, need_beta)
    act, act_backward = ACTIVATIONS[activation]
    hidden, s2 = act(u) if need_a2 else None, s2 if need_b2 else None
    operands = d_update, hidden, fc2[0], fc2[4], s2, fc2[2], fc2[3], fc2[5], fc2[6], 0.0, None, False
    d_hidden, _, d_a2, d_b2 = linear_backward(*operands)
    du = act_backward(d_hidden, u)
    low = fc1[2], fc1[3], fc1[4], s, norm[2], fc1[5], fc1[6], dtype
    asked = need_x, *((need_gamma, need_beta) if norm[0] is not None else (False, False)), need_a, need_b
    x = x if x is None else cast(x, dtype)
    dx, *d_norm, d_a, d_b = norm_linear_backward(du, dx, x, mean, rstd, norm[0], norm[1], fc1[0], *low, asked)
    d_norm = d_norm if d_after is None else d_after
    d_bias = bias_grad(du, fc1) if need_bias else None
    return dx, *d_norm, d_bias, d_a, d_b, bias_grad(d_update, fc2) if need_bias2 else None, d_a2, d_b2
