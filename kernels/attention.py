"""Attention over token rows of unequal lengths, learned rows that all see, and read-only rows that nobody sees.

    out = softmax(q k^T / sqrt(Dh) + visibility) v          q [B, H, Sq, Dh], k and v [B, H, S, Dh]

The S rows are [token rows | `suffix` rows | `read_only` rows]. Sample b's first lengths[b] token rows are keys, suffix
rows always are, read-only rows never (not even for themselves). Read-only rows are queries of a second pass over the
same keys, so the other rows are bitwise what they are without them. A row without any visible key gives 0.

Which implementation runs is decided by device, dtype and shape:
    few queries (up to 64), not causal, on a GPU   attention_small_query.py
    bf16 on a CPU, up to 768 keys                  matmul + softmax, faster than SDPA both ways
    all else                                       PyTorch's scaled_dot_product_attention (SDPA)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .attention_small_query import backward_triton, few_queries, forward_triton, rows_first

MATMUL_KEYS = 768
CHUNK_BYTES = 2**20  # probabilities of as many (sample, head) pairs at a time as a second-level cache holds


# ------------------------------------------------------------------------------------------------------------ reference
def visible_keys(lengths: Tensor | None, keys: int, suffix: int, device: torch.device) -> Tensor:
    """Which keys a row may see, [B or 1, 1, 1, keys]: the first lengths[b] token rows, and the suffix rows."""
    position = torch.arange(keys, device=device)
    if lengths is None:
        return (position >= 0)[None, None, None]
    return ((position < lengths[:, None]) & (position < keys - suffix) | (position >= keys - suffix))[:, None, None]


def blind_rows(lengths: Tensor | None, rows: int, keys: int, suffix: int, causal: bool) -> Tensor | None:
    """Rows that see no key, [B, 1, rows or 1, 1]; None where every row sees one."""
    if lengths is None or (suffix > 0 and not causal):
        return None
    empty = (lengths == 0)[:, None, None, None]
    return empty & (torch.arange(rows, device=lengths.device) < keys - suffix)[:, None] if causal else empty


def _reference(q, k, v, lengths, suffix, read_only, causal):
    rows, keys = q.shape[2], k.shape[2] - read_only
    visible = visible_keys(lengths, keys, suffix, q.device).expand(-1, 1, rows, -1)
    if causal:
        order = torch.arange(rows, device=q.device)
        visible = visible & (order[:, None] >= order[None, :keys])
    scores = (q @ k[:, :, :keys].transpose(2, 3)) * q.shape[3] ** -0.5
    scores = scores.masked_fill(~visible, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) * visible) @ v[:, :, :keys]


# ----------------------------------------------------------------------------------------------------------------- SDPA
def _sdpa(q, k, v, lengths, suffix, causal):
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    visible = visible_keys(lengths, k.shape[2], suffix, q.device)
    if causal:
        order = torch.arange(q.shape[2], device=q.device)
        visible = visible & (order[:, None] >= order)
    blind = blind_rows(lengths, q.shape[2], k.shape[2], suffix, causal)
    if blind is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind)  # without any key: NaN on some devices
    return out.masked_fill(blind, 0)


def _nothing(q, k, v):
    """Attention over 0 samples, differentiable all the same."""
    return q + (k.sum(2, keepdim=True) + v.sum(2, keepdim=True))


# -------------------------------------------------------------------------------------------- matmul + softmax on a CPU
def _pairs(t: Tensor) -> Tensor:
    """[B, H, S, Dh] -> [B * H, S, Dh], contiguous."""
    return t.flatten(0, 1).contiguous()


def _chunks(q: Tensor, k: Tensor):
    """Slices of the B * H pairs."""
    pairs, size = q.shape[0], max(1, CHUNK_BYTES // max(1, q.shape[1] * k.shape[1] * q.element_size()))
    return [slice(i, i + size) for i in range(0, pairs, size)]


def _hidden(q, k, lengths, suffix, causal):
    """bool masks that broadcast to [B * H, Sq, Sk], True where a score does not count."""
    masks = []
    if lengths is not None:
        hidden = ~visible_keys(lengths, k.shape[2], suffix, q.device).expand(-1, q.shape[1], -1, -1)
        masks.append(hidden.flatten(0, 1))
    if causal:
        order = torch.arange(q.shape[2], device=q.device)
        masks.append((order[:, None] < order).expand(q.shape[0] * q.shape[1], -1, -1))
    return masks


def _probabilities(q, k, hidden):
    """softmax(q k^T / sqrt(Dh)): q [n, Sq, Dh], k [n, Sk, Dh] -> [n, Sq, Sk]."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
    for mask in hidden:
        scores.masked_fill_(mask, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1)


def _rows_first(pairs: Tensor, shape) -> Tensor:
    """[B * H, S, Dh] -> [B, H, S, Dh] laid out as [B, S, H, Dh], as the next linear layer reads it."""
    return pairs.view(shape).transpose(1, 2).contiguous().transpose(1, 2)


def forward_aten(q, k, v, lengths, suffix, causal):
    hidden, shape = _hidden(q, k, lengths, suffix, causal), q.shape
    blind = blind_rows(lengths, q.shape[2], k.shape[2], suffix, causal)
    q, k, v = _pairs(q), _pairs(k), _pairs(v)
    out = torch.empty_like(q)
    for s in _chunks(q, k):
        torch.bmm(_probabilities(q[s], k[s], [m[s] for m in hidden]), v[s], out=out[s])
    if blind is not None:
        out.view(shape).masked_fill_(blind, 0)
    return _rows_first(out, shape)


def backward_aten(d_out, q, k, v, lengths, suffix, causal, wants_out=False):
    """dq, dk, dv, and the forward's result if wanted; the probabilities are computed again."""
    hidden, shapes, scale = _hidden(q, k, lengths, suffix, causal), (q.shape, k.shape, v.shape), q.shape[3] ** -0.5
    blind = blind_rows(lengths, q.shape[2], k.shape[2], suffix, causal)
    d_out = d_out if blind is None else d_out.masked_fill(blind, 0)
    q, k, v, d_out = _pairs(q), _pairs(k), _pairs(v), _pairs(d_out)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    out = torch.empty_like(q) if wants_out else None
    none = q.new_empty(())
    for s in _chunks(q, k):
        p = _probabilities(q[s], k[s], [m[s] for m in hidden])
        if wants_out:
            torch.bmm(p, v[s], out=out[s])
        torch.bmm(p.transpose(1, 2), d_out[s], out=dv[s])
        dp = torch.bmm(d_out[s], v[s].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        torch.baddbmm(none, ds, k[s], beta=0, alpha=scale, out=dq[s])
        torch.baddbmm(none, ds.transpose(1, 2), q[s], beta=0, alpha=scale, out=dk[s])
    if wants_out and blind is not None:
        out.view(shapes[0]).masked_fill_(blind, 0)
    results = zip((dq, dk, dv, out), (*shapes, shapes[0]), strict=True)
    return tuple(_rows_first(t, shape) for t, shape in results if t is not None)


# -------------------------------------------------------------------------------------------------------- registration
def uses_matmul(q: Tensor, k: Tensor) -> bool:
    """Whether attention runs as matmul + softmax, whose backward computes the probabilities again."""
    return q.dtype == torch.bfloat16 and q.is_cpu and k.shape[2] <= MATMUL_KEYS and backend.resolve(q) == "torch"


def uses_triton(q: Tensor, causal: bool) -> bool:
    """Whether the few queries of q have a kernel of their own."""
    return not causal and few_queries(q) and backend.resolve(q) == "triton"


def _fake(q, k, v, lengths, suffix, causal):
    if uses_triton(q, causal):
        return rows_first(q), q.new_empty(q.shape[0] * q.shape[1], q.shape[2], dtype=backend.wide(q.dtype))
    return rows_first(q), None


attention_forward = backend.Op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, SymInt suffix, bool causal) -> (Tensor, Tensor)",
    aten=lambda *operands: (forward_aten(*operands), None),
    triton=lambda q, k, v, lengths, suffix, causal: forward_triton(q, k, v, lengths, suffix),
    fake=_fake,
)


def _backward_aten(d_out, q, k, v, lengths, out, lse, suffix, causal):
    return backward_aten(d_out, q, k, v, lengths, suffix, causal)


def _backward_triton(d_out, q, k, v, lengths, out, lse, suffix, causal):
    return backward_triton(d_out, q, k, v, lengths, out, lse, suffix)


attention_backward = backend.Op(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? out, Tensor? lse, "
    "SymInt suffix, bool causal) -> (Tensor, Tensor, Tensor)",
    aten=_backward_aten,
    triton=_backward_triton,
    fake=lambda d_out, q, k, v, *_: (rows_first(q), rows_first(k), rows_first(v)),
)


class _Attention(torch.autograd.Function):
    """out [B, H, Sq, Dh], laid out as [B, Sq, H, Dh]."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, suffix, causal):
        out, lse = attention_forward(q, k, v, lengths, suffix, causal)
        ctx.suffix, ctx.causal = suffix, causal
        ctx.save_for_backward(q, k, v, lengths, None if lse is None else out, lse)
        return out

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_out):
        grads = attention_backward(d_out, *ctx.saved_tensors, ctx.suffix, ctx.causal)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), None, None, None


# --------------------------------------------------------------------------------------------------------------- public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    suffix: int = 0,
    read_only: int = 0,
    causal: bool = False,
) -> Tensor:
    """Softmax attention, scaled by Dh^-0.5.

    Args:
        q: [B, H, Sq, Dh]. Sq may differ from S (queries only), with neither `read_only` nor `causal`.
        k, v: [B, H, S, Dh]; any strides, as views of one q,k,v buffer have.
        lengths: [B] integers: how many of the token rows, from the first on, are keys. All of them without it.
        suffix: how many rows after the token rows are keys whatever the lengths.
        read_only: how many rows at the very end see the other rows and are seen by none.
        causal: row i sees rows up to i only.

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
    if backend.resolve(q, k, v, lengths) == "reference":
        return _reference(q, k, v, lengths, suffix, read_only, causal)
    if read_only == 0:
        return _run(q, k, v, lengths, suffix, causal)
    rows = q.shape[2] - read_only
    k, v = k[:, :, :rows], v[:, :, :rows]
    ordinary = _run(q[:, :, :rows], k, v, lengths, suffix, causal)
    readers = _run(q[:, :, rows:], k, v, lengths, suffix, False)
    return torch.cat((ordinary.transpose(1, 2), readers.transpose(1, 2)), 1).transpose(1, 2)


def _run(q, k, v, lengths, suffix, causal):
    """Attention without read-only rows, by the implementation that suits device, dtype and shape."""
    if q.shape[0] == 0:  # nobody: flash kernels refuse it before torch 2.10
        return _nothing(q, k, v)
    if uses_matmul(q, k) or uses_triton(q, causal):
        if backend.needs_grad(q, k, v):
            return _Attention.apply(q, k, v, lengths, suffix, causal)
        return attention_forward(q, k, v, lengths, suffix, causal)[0]
    return _sdpa(q, k, v, lengths, suffix, causal)


def _check(q, k, v, lengths, suffix, read_only, causal):
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3:] != q.shape[3:]:
        raise ValueError(
            f"q must be [B, H, Sq, Dh] and k, v [B, H, S, Dh], not {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
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
    if q.shape[2] != k.shape[2] and (read_only or causal):
        raise ValueError(
            f"read_only and causal need as many rows in q as in k and v, not {q.shape[2]} and {k.shape[2]}: "
            "leave them out"
        )
