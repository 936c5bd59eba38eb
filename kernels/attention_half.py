"""The attention half of a transformer block, forward and backward, for transformer_block.py.

    z = norm'(x + scale * o(attend(qkv(norm(x)))))          x [B * T, D]

norm (before), norm' (after) and scale (LayerScale's, [D]) may each be missing. The ops of norm_linear.py,
attention_rows.py and linear_lowrank.py in turn; what is kept is what these would keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_rows import attention_rows_backward, attention_rows_forward
from .backend import cast
from .linear_backward import linear_backward
from .linear_lowrank import linear_lowrank_op
from .norm_linear import norm_linear_backward, norm_linear_forward
from .operands import Half, add_update, add_update_backward, bias_grad, kept_as


class Attention(NamedTuple):
    """How the rows are divided among samples, and which keys they see, as in `attention_rows`.

    >>> Attention(heads=2, groups=(3, 5, 5), lengths=None, suffix=0, causal=False).heads
    2
    """

    heads: int
    groups: tuple[int, ...]
    lengths: Tensor | None
    suffix: int
    causal: bool


def forward(x: Tensor, half: Half, see: Attention, dtype: torch.dtype):
    """z [M, D], and what backward needs."""
    norm, qkv, o, scale, after = half
    y, s, mean, rstd = norm_linear_forward(x, *norm[:2], *qkv[:5], norm[2], *qkv[5:], dtype)
    out, s_o, lse = attention_rows_forward(y, None, o.lora_a, *see)
    weight, bias, _, lora_b, weight_scale, scaling, groups, int8 = o
    update = linear_lowrank_op(out, weight, bias, s_o, lora_b, scaling, weight_scale, groups, int8, None, None)
    z, *ended = add_update(x, update, scale, after)
    kept = kept_as(x, dtype) if norm[0] is not None or qkv[2] is not None else None
    return z, (kept, mean, rstd, s, y, None if lse is None else out, lse, s_o, *ended)


def backward(dz, kept, half: Half, see: Attention, dtype: torch.dtype, needs):
    """Gradients of x and of what `Half.trained` lists, in its order; those that `needs` asks for."""
    norm, qkv, o, scale, after = half
    x, mean, rstd, s, y, out, lse, s_o, *ended = kept
    need_x, need_gamma, need_beta, need_bias, need_a, need_b, need_o_bias, _, need_o_b = needs
    dx, d_update, d_after = add_update_backward(dz, *ended, scale, after, y.dtype, need_gamma, need_beta)
    s_o = s_o if need_o_b else None
    operands = d_update, None, o[0], o[4], s_o, None, o[3], o[5], o[6], 0.0, None, o[2] is not None
    d_out, d_s, _, d_o_b = linear_backward(*operands)
    d_y, _, d_o_a = attention_rows_backward(d_out, d_s, y, None, o[2], out, lse, *see)
    low = qkv[2], qkv[3], qkv[4], s, norm[2], qkv[5], qkv[6], dtype
    asked = need_x, *((need_gamma, need_beta) if norm[0] is not None else (False, False)), need_a, need_b
    x = x if x is None else cast(x, dtype)
    dx, *d_norm, d_a, d_b = norm_linear_backward(d_y, dx, x, mean, rstd, norm[0], norm[1], qkv[0], *low, asked)
    d_norm = d_norm if d_after is None else d_after
    d_bias = bias_grad(d_y, qkv) if need_bias else None
    return dx, *d_norm, d_bias, d_a, d_b, bias_grad(d_update, o) if need_o_bias else None, d_o_a, d_o_b
