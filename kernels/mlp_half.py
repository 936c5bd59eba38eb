"""The MLP half of a transformer block, forward and backward, for transformer_block.py.

    u = fc1(norm(x))          z = norm'(x + scale * fc2(act(u)))          x [M, D], u [M, F]

norm (before), norm' (after) and scale (LayerScale's, [D]) may each be missing. u is kept, act(u) is computed again. Of
a gated MLP u is [gate, up], [M, 2 F], and act(u) = act(gate) * up, as in gated.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .gated import gated_backward, gated_forward
from .operands import Half, add_update, add_update_backward, bias_grad, kept_as


def _gated(name: str) -> tuple[Callable, Callable]:
    return lambda u: gated_forward(u, name), lambda d, u: gated_backward(d, u, name)


# name: (act(u), the gradient of u from that of act(u)); "gated_silu" and the like for a gated MLP
BETWEEN = ACTIVATIONS | {f"gated_{name}": _gated(name) for name in ACTIVATIONS}


def forward(x: Tensor, half: Half, activation: str, dtype: torch.dtype, steps: ModuleType):
    """z [M, D], and what backward needs."""
    norm, fc1, fc2, scale, after = half
    u, s, mean, rstd = steps.enter_project(x, norm, fc1, dtype)
    joined = scale is None and x.dtype == dtype
    update, s2 = steps.project(BETWEEN[activation][0](u), fc2, x if joined else None)
    z, *left = add_update(x, update, scale, after, joined)
    kept = kept_as(x, dtype) if norm[0] is not None or fc1[2] is not None else None
    return z, (kept, mean, rstd, s, u, s2, *left)


def backward(dz: Tensor, kept, half: Half, activation: str, needs, steps: ModuleType):
    """Gradients of x and of what `Half.trained` lists, in its order; those that `needs` asks for."""
    norm, fc1, fc2, scale, after = half
    x, mean, rstd, s, u, s2, *left = kept
    need_x, need_gamma, need_beta, need_bias, need_a, need_b, need_bias2, need_a2, need_b2 = needs
    act, act_backward = BETWEEN[activation]
    dx, d_update, d_norm = add_update_backward(dz, *left, scale, after, u.dtype, need_gamma, need_beta)
    hidden, s2 = act(u) if need_a2 else None, s2 if need_b2 else None
    d_hidden, _, d_a2, d_b2 = steps.project_backward(d_update, hidden, s2, fc2)
    du = act_backward(d_hidden, u)
    asked = need_x, need_gamma, need_beta, need_a, need_b
    dx, *d_entered, d_a, d_b = steps.enter_project_backward(du, dx, (x, mean, rstd, s), norm, fc1, asked)
    d_bias = bias_grad(du, fc1) if need_bias else None
    d_bias2 = bias_grad(d_update, fc2) if need_bias2 else None
    return dx, *(d_norm or d_entered), d_bias, d_a, d_b, d_bias2, d_a2, d_b2
