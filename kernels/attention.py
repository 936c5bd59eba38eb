"""Attention over token rows of unequal lengths, learned rows that all see, and read-only rows that nobody sees.

    out = softmax(q k^T / sqrt(Dh) + visibility) v          q [B, H, Sq, Dh], k and v [B, kv_heads, S, Dh]

The S rows are [token rows | `suffix` rows | `read_only` rows]. Sample b's first lengths[b] token rows are keys, suffix
rows always are, read-only rows never (not even for themselves). Read-only rows are queries of a second pass over the
same keys, so the other rows are bitwise what they are without them. A row without any visible key gives 0. Head i of q
reads head i // (H // kv_heads) of k and v.

Which implementation runs is decided by device, dtype and shape:
    few queries (up to 64), not causal, on a GPU   attention_small_query.py
    a CPU: bf16 up to 768 keys, short windows      attention_matmul.py
    all else                                       PyTorch's scaled_dot_product_attention (SDPA)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, products
from .attention_mask import blind_rows, hidden, in_effect, needs_mask
from .attention_matmul import backward_matmul, fits_matmul, forward_matmul
from .attention_small_query import backward_triton, few_queries, forward_triton, rows_first


# ------------------------------------------------------------------------------------------------------------ reference
def _reference(q, k, v, lengths, suffix, read_only, causal, window, positions):
    keys = k.shape[2] - read_only
    order = torch.arange(k.shape[2], device=q.device)
    row, key, tokens = order[max(0, len(order) - q.shape[2]) :, None], order[:keys], keys - suffix
    visible = (row >= key if causal else key[None] >= 0)[None, None]
    if lengths is not None:
        visible = visible & ((key < lengths[:, None]) | (key >= tokens))[:, None, None]
    if window is not None:
        at = order[None] if positions is None else positions
        near = (at[:, :, None] - at[:, None]).abs() <= window
        visible = visible & (near | (row >= tokens) | (key >= tokens))[:, None]
    k, v = (t[:, :, :keys].repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) * visible) @ v


# ----------------------------------------------------------------------------------------------------------------- SDPA
def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, causal: bool = False) -> Tensor:
    """PyTorch's, also where k and v have fewer heads; visible: bool, broadcasts to [B, H, Sq, S]."""
    shares = k.shape[1] < q.shape[1]
    if shares and q.is_cuda and (visible is not None or q.dtype not in (torch.float16, torch.bfloat16)):
        # Flash attention shares heads but takes neither; memory-efficient attention takes both but shares none.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        shares = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=shares)


def _sdpa(q, k, v, *seen):
    queries, keys = q.shape[2], k.shape[2]
    if not needs_mask(queries, keys, *seen):
        return sdpa(q, k, v, causal=seen[2])
    visible, blind = ~hidden(queries, keys, q.device, *seen), blind_rows(queries, keys, *seen)
    if blind is None:
        return sdpa(q, k, v, visible)
    out = sdpa(q, k, v, visible | blind)  # without any key: NaN on some devices
    return out.masked_fill(blind, 0)


def _nothing(q, k, v):
    """Attention of 0 samples or 0 queries, differentiable all the same."""
    return q + (k.sum() + v.sum())


# -------------------------------------------------------------------------------------------------------- registration
def uses_matmul(q: Tensor, k: Tensor, lengths=None, suffix=0, causal=False, window=None, positions=None) -> bool:
    """Whether attention runs as matmul + softmax, whose backward computes the probabilities again."""
    return q.is_cpu and fits_matmul(q, k.shape[2], lengths, suffix, window, positions) and backend.resolve(q) == "torch"


def uses_triton(q: Tensor, k: Tensor, causal: bool, window: int | None) -> bool:
    """Whether the few queries of q have a kernel of their own."""
    return not causal and window is None and few_queries(q, k) and backend.resolve(q) == "triton"


def _fake(q, k, v, lengths, suffix, causal, window, positions):
    if uses_triton(q, k, causal, window):
        return rows_first(q), q.new_empty(q.shape[0] * q.shape[1], q.shape[2], dtype=backend.wide(q.dtype))
    return rows_first(q), None


attention_forward = backend.Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, SymInt suffix, bool causal, int? window, "
    "Tensor? positions) -> (Tensor, Tensor)",
    aten=lambda *operands: (forward_matmul(*operands), None),
    triton=lambda *operands: forward_triton(*operands[:5]),  # neither causal nor with a window: `uses_triton`
    fake=_fake,
)


def _backward_aten(d_out, q, k, v, lengths, out, lse, suffix, causal, window, positions):
    return backward_matmul(d_out, q, k, v, lengths, suffix, causal, window, positions)


def _backward_triton(d_out, q, k, v, lengths, out, lse, suffix, *_):
    return backward_triton(d_out, q, k, v, lengths, out, lse, suffix)


attention_backward = backend.Op(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? out, Tensor? lse, "
    "SymInt suffix, bool causal, int? window, Tensor? positions) -> (Tensor, Tensor, Tensor)",
    aten=_backward_aten,
    triton=_backward_triton,
    fake=lambda d_out, q, k, v, *_: (rows_first(q), rows_first(k), rows_first(v)),
)


class _Attention(torch.autograd.Function):
    """out [B, H, Sq, Dh], laid out as [B, Sq, H, Dh]."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, suffix, causal, window, positions):
        out, lse = attention_forward(q, k, v, lengths, suffix, causal, window, positions)
        ctx.options = suffix, causal, window
        ctx.save_for_backward(q, k, v, lengths, None if lse is None else out, lse, positions)
        return out

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_out):
        *operands, positions = ctx.saved_tensors
        grads = attention_backward(d_out, *operands, *ctx.options, positions)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 5


# --------------------------------------------------------------------------------------------------------------- public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    suffix: int = 0,
    read_only: int = 0,
    causal: bool = False,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Softmax attention, scaled by Dh^-0.5.

    Args:
        q: [B, H, Sq, Dh]. Sq may differ from S (queries only), with neither `read_only` nor `window`.
        k, v: [B, kv_heads, S, Dh], H a multiple of kv_heads; any strides, as views of one q,k,v buffer have.
        lengths: [B] integers: how many of the token rows, from the first on, are keys. All of them without it.
        suffix: how many rows after the token rows are keys whatever the lengths.
        read_only: how many rows at the very end see the other rows and are seen by none.
        causal: a row sees none after itself. The Sq queries are the last of the S rows: the last sees all.
        window: token rows see token rows at a distance of at most `window`; suffix rows see and are seen as without.
        positions: int64 [B, S], what distances are of; None: the order of the rows.

    Returns:
        [B, H, Sq, Dh] in the dtype of q (the autocast dtype under autocast). Rows of padding are finite and undefined;
        where a sample has no key at all the result is 0.

    Raises:
        TypeError, ValueError: dtypes, shapes or counts that do not fit together.

    >>> v = torch.tensor([1.0, 3.0, 50.0]).view(1, 1, 3, 1)
    >>> attention(torch.zeros_like(v), v, v, lengths=torch.tensor([2]))[0, 0, 0]
    tensor([2.])
    """
    q, k, v = (backend.in_autocast_dtype(t) for t in (q, k, v))
    _check(q, k, v, lengths, suffix, read_only, causal)
    check_window(window, positions, tuple(k.shape[::2]), q.shape[2] == k.shape[2] and read_only == 0)
    if backend.resolve(q, k, v, lengths, positions) == "reference":
        return _reference(q, k, v, lengths, suffix, read_only, causal, window, positions)
    if read_only == 0:
        return _run(q, k, v, lengths, suffix, causal, window, positions)
    rows = q.shape[2] - read_only
    k, v = k[:, :, :rows], v[:, :, :rows]
    ordinary = _run(q[:, :, :rows], k, v, lengths, suffix, causal, None, None)
    readers = _run(q[:, :, rows:], k, v, lengths, suffix, False, None, None)
    return torch.cat((ordinary.transpose(1, 2), readers.transpose(1, 2)), 1).transpose(1, 2)


def _run(q, k, v, *seen):
    """Attention without read-only rows, by the implementation that suits device, dtype and shape."""
    if q.shape[0] == 0 or q.shape[2] == 0:  # nobody asks: flash kernels refuse no samples before torch 2.10
        return _nothing(q, k, v)
    _, _, causal, window, _ = seen = in_effect(q.shape[2], k.shape[2], *seen)
    if uses_matmul(q, k, *seen) or uses_triton(q, k, causal, window):
        if backend.needs_grad(q, k, v):
            return _Attention.apply(q, k, v, *seen)
        return attention_forward(q, k, v, *seen)[0]
    if products.one_by_one(q):
        return products.in_fp32(lambda *qkv: _sdpa(*qkv, *seen), q, k, v).to(q.dtype)
    return _sdpa(q, k, v, *seen)


def check_window(window: int | None, positions: Tensor | None, shape: tuple[int, ...], all_rows: bool) -> None:
    """Refuse a window that does not fit; shape: that of `positions`; all_rows: whether every row asks and is asked."""
    if window is None:
        return
    if window < 0:
        raise ValueError(f"window must be a distance, 0 or more, not {window}: leave it out for none")
    if not all_rows:
        raise ValueError("a window needs q of the same rows as k and v: leave it out where only some rows ask")
    if positions is not None and (positions.shape != shape or positions.dtype != torch.int64):
        raise ValueError(f"positions must be int64 {list(shape)}, not {positions.dtype} {list(positions.shape)}")


def _check(q, k, v, lengths, suffix, read_only, causal):
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and k.shape[::3] == q.shape[::3]
    if not fits or 0 in (k.shape[1], k.shape[3]) or q.shape[1] % k.shape[1]:
        shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        raise ValueError(f"q must be [B, H, Sq, Dh] and k, v [B, H, S, Dh], or fewer heads that divide H, not {shapes}")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must have one floating point dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"lengths must be {list(q.shape[:1])} integers, not {lengths.dtype} {list(lengths.shape)}; a padding mask "
            "with holes or on the left has to be packed first"
        )
    if min(suffix, read_only) < 0 or suffix + read_only > k.shape[2]:
        raise ValueError(
            f"suffix {suffix} and read_only {read_only} must be counts of the {k.shape[2]} rows of k and v"
        )
    if q.shape[2] != k.shape[2] if read_only else causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"read_only needs as many rows in q as in k and v, causal no more, not {q.shape[2]} and {k.shape[2]}: "
            "leave them out"
        )
