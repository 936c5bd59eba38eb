"""The attention half of a transformer block, forward and backward, for transformer_block.py.

    z = norm'(x + scale * o(attend(turn(qkv(norm(x))))))          x [B * T, D]

norm (before), norm' (after), scale (LayerScale's, [D]) and turn (rotary.py) may each be missing. `steps` is
steps_aten.py or steps_triton.py; what is kept is what norm_linear, attention_rows and linear_lowrank would keep.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_rows import attend, attend_backward
from .attention_varlen import Ends
from .operands import Half, add_update, add_update_backward, bias_grad, kept_as
from .rotary import rotate, rotate_backward

KEPT = 12  # tensors that the forward keeps


class Attention(NamedTuple):
    """How the rows are divided among samples, and which keys they see, as in `attention_rows`.

    >>> Attention(heads=2, groups=(3, 5, 5), lengths=None, suffix=0, causal=False).heads
    2
    """

    heads: int
    groups: tuple[int, ...] | Ends
    lengths: Tensor | None
    suffix: int
    causal: bool
    kv_heads: int | None = None
    window: int | None = None
    positions: Tensor | None = None


class Turn(NamedTuple):
    """How queries and keys are normalised and turned before they meet, as in `rotary`.

    >>> Turn(heads=2, cos=torch.ones(3, 4), sin=torch.zeros(3, 4)).weight is None
    True
    """

    heads: int  # of q and k together
    cos: Tensor | None  # [N, Dh / 2]
    sin: Tensor | None
    weight: Tensor | None = None  # [heads, Dh]
    eps: float = 1e-6


def forward(
    x: Tensor, half: Half, see: Attention, turn: Turn | None, dtype: torch.dtype, steps: ModuleType,
    differentiable: bool,
):  # fmt: skip
    """z [M, D]; tensors that backward needs, and the graph of attention where autograd differentiates it."""
    norm, qkv, o, scale, after = half
    y, s, mean, rstd = steps.enter_project(x, norm, qkv, dtype)
    unturned = None if turn is None else rotate(y, *turn)
    out, lse, graph = attend(y, *see, differentiable)
    joined = scale is None and x.dtype == dtype
    update, s_o = steps.project(out, o, x if joined else None)
    z, *left = add_update(x, update, scale, after, joined)
    kept = kept_as(x, dtype) if norm[0] is not None or qkv[2] is not None else None
    return z, (kept, mean, rstd, s, y, unturned, None if lse is None else out, lse, s_o, *left), graph


def backward(dz: Tensor, kept, graph, half: Half, see: Attention, turn: Turn | None, needs, steps: ModuleType):
    """Gradients of x and of what `Half.trained` lists, in its order; those that `needs` asks for."""
    norm, qkv, o, scale, after = half
    x, mean, rstd, s, y, unturned, out, lse, s_o, *left = kept
    need_x, need_gamma, need_beta, need_bias, need_a, need_b, need_o_bias, need_o_a, need_o_b = needs
    dx, d_update, d_norm = add_update_backward(dz, *left, scale, after, y.dtype, need_gamma, need_beta)
    h, s_o = out if need_o_a else None, s_o if need_o_b else None
    again = out is None and need_o_a  # attention's result, which its backward computes again: dA is made there
    d_out, d_s, d_o_a, d_o_b = steps.project_backward(d_update, h, s_o, o, apart=again)
    dy, d_a_of_again = attend_backward(d_out, d_s, y, o[2], out, lse, graph, *see)
    if turn is not None:
        rotate_backward(dy, unturned, *turn)
    asked = need_x, need_gamma, need_beta, need_a, need_b
    dx, *d_entered, d_a, d_b = steps.enter_project_backward(dy, dx, (x, mean, rstd, s), norm, qkv, asked)
    d_bias = bias_grad(dy, qkv) if need_bias else None
    d_o_bias = bias_grad(d_update, o) if need_o_bias else None
    return dx, *(d_norm or d_entered), d_bias, d_a, d_b, d_o_bias, d_a_of_again if again else d_o_a, d_o_b
