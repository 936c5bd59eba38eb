"""Attention and the low-rank product of its result, so that the result itself is not kept for backward.

    out = attention(q, k, v)          s = out A^T                   A [R, H * Dh], s [B, S, R]

Only dA needs `out` in backward. Where attention computes its probabilities again there, `out` costs one more product
per head; where it keeps `out` for itself (SDPA), the same tensor serves both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .attention import attention, backward_aten, forward_aten, uses_matmul
from .attention_small_query import rows_first


def _rows(out: Tensor) -> Tensor:
    """[B, H, S, Dh] -> [B, S, H * Dh]"""
    return out.transpose(1, 2).flatten(2)


@torch.library.custom_op(
    "u2a_fast::attention_project",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor lora_a, Tensor? lengths, SymInt suffix, bool causal) "
    "-> (Tensor, Tensor)",
)
def _forward(q, k, v, lora_a, lengths, suffix, causal):
    """out [B, H, S, Dh], laid out as [B, S, H, Dh], and s [B, S, R]."""
    out = forward_aten(q, k, v, lengths, suffix, causal)
    return out, F.linear(_rows(out), lora_a.to(out.dtype))


@_forward.register_fake
def _(q, k, v, lora_a, lengths, suffix, causal):
    return rows_first(q), q.new_empty(q.shape[0], q.shape[2], lora_a.shape[0])


@torch.library.custom_op(
    "u2a_fast::attention_project_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor d_s, Tensor q, Tensor k, Tensor v, Tensor lora_a, Tensor? lengths, SymInt suffix, "
    "bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
)
@backend.outside_autocast
def _backward(d_out, d_s, q, k, v, lora_a, lengths, suffix, causal):
    """dq, dk and dv, each [B, H, S, Dh] laid out as [B, S, H, Dh], and dA [R, H * Dh]."""
    batch, heads, rows, head_dim = q.shape
    through_s = (d_s @ lora_a.to(d_s.dtype)).view(batch, rows, heads, head_dim).transpose(1, 2)
    dq, dk, dv, out = backward_aten(d_out + through_s, q, k, v, lengths, suffix, causal, wants_out=True)
    return dq, dk, dv, (d_s.flatten(0, 1).t() @ _rows(out).flatten(0, 1)).to(lora_a.dtype)


@_backward.register_fake
def _(d_out, d_s, q, k, v, lora_a, lengths, suffix, causal):
    return rows_first(q), rows_first(k), rows_first(v), torch.empty_like(lora_a)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.suffix, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, d_out, d_s):
    grads = _backward(d_out, d_s, *ctx.saved_tensors, ctx.suffix, ctx.causal)
    needs = ctx.needs_input_grad
    return *(g if need else None for g, need in zip(grads, needs[:4], strict=True)), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def attention_project(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lora_a: Tensor | None,
    lengths: Tensor | None = None,
    suffix: int = 0,
    causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attention`, and the product of its rows with lora_a^T for the linear that follows.

    Args:
        q, k, v, lengths, suffix, causal: as in `attention`.
        lora_a: [R, H * Dh], cast to the compute dtype; None: no product.

    Returns:
        `attention`'s result [B, H, S, Dh], and s [B, S, R] (None without `lora_a`).

    >>> q = torch.ones(1, 1, 2, 1)
    >>> attention_project(q, q, q, torch.full((1, 1), 3.0))[1]
    tensor([[[3.],
             [3.]]])
    """
    if lora_a is not None and (lora_a.dim() != 2 or lora_a.shape[1] != q.shape[1] * q.shape[3]):
        raise ValueError(f"lora_a must be [R, {q.shape[1] * q.shape[3]}] (H * Dh), not {list(lora_a.shape)}")
    q, k, v = (backend.in_autocast_dtype(t) for t in (q, k, v))
    backend.resolve(q, k, v, lora_a, lengths)
    if lora_a is None or not uses_matmul(q, k):
        out = attention(q, k, v, lengths, suffix=suffix, causal=causal)
        return out, None if lora_a is None else F.linear(_rows(out), lora_a.to(out.dtype))
    return _forward(q, k, v, lora_a, lengths, suffix, causal)
