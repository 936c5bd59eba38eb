"""Self-attention over rows of many samples laid end to end, and the low-rank product of its result.

    out = softmax(q k^T / sqrt(Dh) + visibility) v, sample by sample          q [Nq, H * Dh], k and v [N, H * Dh]
    s   = out A^T                                                             A = lora_a [R, H * Dh]

The rows of samples of equal length stand together: a `Group` of them is a dense [samples, rows, H, Dh] view of the
buffer, so that padding is neither stored nor masked nor computed. q may have fewer rows than k and v: only those whose
result is read. Heads are views as well; backward writes the gradients of q, k and v into one buffer.

On a CPU each group runs as matmul + softmax, which backward computes again (bf16, up to 768 keys), or as ATen's flash
attention. On a GPU several groups are one call of a varlen function, flash-attn's or torch's own, which takes rows as
they lie; a single one, and what these functions do not take, is a call of `attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .attention import (
    MATMUL_KEYS,
    attention,
    attention_backward,
    attention_forward,
    blind_rows,
    uses_triton,
    visible_keys,
)
from .attention import backward_aten as matmul_backward
from .attention import forward_aten as matmul_forward
from .attention_varlen import Ends, by_mask, by_varlen, ends_of, fits_varlen, varlen_function
from .backend import cast

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Group(NamedTuple):
    """Samples of equal length: how many, the rows of each in q, and the rows of each in k and v.

    >>> Group(samples=3, queries=1, keys=5).keys
    5
    """

    samples: int
    queries: int
    keys: int


# ----------------------------------------------------------------------------------------------------------------- ATen
def _heads(q: Tensor, kv: Tensor | None, samples: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [samples, H, S, Dh], views of [samples * S, 3 D], or of [samples * Sq, D] and [samples * S, 2 D]."""
    if kv is None:
        width = q.shape[1] // (3 * heads)
        return q.view(samples, -1, 3, heads, width).permute(2, 0, 3, 1, 4).unbind()
    width = q.shape[1] // heads
    k, v = kv.view(samples, -1, 2, heads, width).permute(2, 0, 3, 1, 4).unbind()
    return q.view(samples, -1, heads, width).transpose(1, 2), k, v


def _parts(groups: Sequence[Group], of_queries: Sequence[Tensor | None], of_keys: Sequence[Tensor | None]) -> Iterator:
    """(samples, parts) of every group that has keys and queries: its rows of each tensor, those with a row for every
    query first."""
    q_at = k_at = 0
    for samples, query_rows, key_rows in groups:
        q_end, k_end = q_at + samples * query_rows, k_at + samples * key_rows
        if q_end > q_at and k_end > k_at:
            yield samples, *_from_to(of_queries, q_at, q_end), *_from_to(of_keys, k_at, k_end)
        q_at, k_at = q_end, k_end


def _from_to(tensors, start, end):
    """Rows of each; of all of them no view, whose gradient would be copied between zeros."""
    return [t if t is None or len(t) == end - start else t[start:end] for t in tensors]


def _bias(q, k, lengths, suffix, causal):
    """What is added to the scores, [B or 1, 1, Sq or 1, Sk]: -inf where a key is not seen; and rows that see none."""
    visible, blind = visible_keys(lengths, k.shape[2], suffix, q.device), None
    if causal:
        order = torch.arange(q.shape[2], device=q.device)
        visible = visible & (order[:, None] >= order)
    blind = blind_rows(lengths, q.shape[2], k.shape[2], suffix, causal)
    seen = visible if blind is None else visible | blind
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf")), blind


def _flash(q, k, v, lengths, suffix, causal):
    """(out, log-sum-exp)"""
    if lengths is None:
        return flash(q, k, v, 0.0, causal)
    bias, blind = _bias(q, k, lengths, suffix, causal)
    out, lse = flash(q, k, v, 0.0, False, attn_mask=bias)
    return out if blind is None else out.masked_fill_(blind, 0), lse


def _flash_backward(d_out, q, k, v, out, lse, lengths, suffix, causal):
    """dq, dk, dv"""
    if lengths is None:
        return flash_backward(d_out, q, k, v, out, lse, 0.0, causal)
    bias, blind = _bias(q, k, lengths, suffix, causal)
    d_out = d_out if blind is None else d_out.masked_fill(blind, 0)
    return flash_backward(d_out, q, k, v, out, lse, 0.0, False, attn_mask=bias)


def _attend(q, kv, samples, heads, recomputed, *seen):
    """out [rows of q, D] of samples of equal length, and log-sum-exp [rows of q, H], None where it is recomputed."""
    q, k, v = _heads(q, kv, samples, heads)
    if recomputed:
        out, lse = matmul_forward(q, k, v, *seen), None
    else:
        out, lse = _flash(q, k, v, *seen)
        lse = lse.transpose(1, 2).reshape(-1, heads)
    return out.transpose(1, 2).reshape(-1, heads * q.shape[3]), lse  # views: attention lays out its results by rows


def forward_aten(q, kv, lora_a, heads, groups, lengths, suffix, causal):
    """out [Nq, D], s [Nq, R] or None, and flash attention's log-sum-exp [Nq, H] or None."""
    groups = _groups(groups)
    recomputed = recomputes(q, groups)
    seen = heads, recomputed, lengths, suffix, causal
    if len(groups) == 1 and min(groups[0]) > 0:
        out, lse = _attend(q, kv, groups[0][0], *seen)
    else:
        each = [_attend(of_q, of_kv, samples, *seen) for samples, of_q, of_kv in _parts(groups, (q,), (kv,))]
        width = q.shape[1] // 3 if kv is None else q.shape[1]
        out = _end_to_end([out for out, _ in each], q.shape[0], width, q)
        wide = backend.wide(q.dtype)
        lse = None if recomputed else _end_to_end([lse for _, lse in each], q.shape[0], heads, q, wide)
    return out, None if lora_a is None else F.linear(out, cast(lora_a, out.dtype)), lse


def _end_to_end(parts: list[Tensor], rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The parts one after the other, [rows, width]; zeros where rows without a key are the only ones."""
    if not parts:
        return like.new_zeros(rows, width, dtype=dtype)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_backward(d_out, q, kv, out, lse, samples, heads, wants_out, *seen):
    """d_q, d_kv (None where kv is) and out (None unless wanted) of samples of equal length."""
    views = _heads(q, kv, samples, heads)
    by_head = samples, -1, heads, views[0].shape[3]
    d_out = d_out.view(by_head).transpose(1, 2)
    if out is None:
        dq, dk, dv, *again = matmul_backward(d_out, *views, *seen, wants_out=wants_out)
        out = again[0].transpose(1, 2).reshape(q.shape[0], -1) if wants_out else None
    else:
        own_out, own_lse = out.view(by_head).transpose(1, 2), lse.view(samples, -1, heads).transpose(1, 2)
        dq, dk, dv = _flash_backward(d_out, *views, own_out, own_lse, *seen)
    dq, dk, dv = dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)  # [samples, S, H, Dh]
    if kv is None:
        return torch.stack((dq, dk, dv), 2).view(q.shape), None, out
    return dq.reshape(q.shape), torch.stack((dk, dv), 2).view(kv.shape), out


def backward_aten(d_out, d_s, q, kv, lora_a, out, lse, heads, groups, lengths, suffix, causal):
    """d_q, d_kv (None where kv is) and dA (None without lora_a). `out` and `lse`: of flash attention."""
    groups, wants_out = _groups(groups), d_s is not None
    if wants_out:
        a = cast(lora_a, d_s.dtype)
        d_out = d_s @ a if d_out is None else torch.addmm(d_out, d_s, a)
    seen = heads, wants_out, lengths, suffix, causal
    if len(groups) == 1 and min(groups[0]) > 0:
        d_q, d_kv, out = _attend_backward(d_out, q, kv, out, lse, groups[0][0], *seen)
    else:
        recomputed, of_rows = out is None, (d_out, q, out, lse)
        each = [
            _attend_backward(own_d_out, own_q, own_kv, own_out, own_lse, samples, *seen)
            for samples, own_d_out, own_q, own_out, own_lse, own_kv in _parts(groups, of_rows, (kv,))
        ]
        d_q = _end_to_end([t[0] for t in each], *q.shape, q)
        d_kv = None if kv is None else _end_to_end([t[1] for t in each], *kv.shape, kv)
        out = _end_to_end([t[2] for t in each], *d_out.shape, q) if recomputed and wants_out else out
    return d_q, d_kv, cast(d_s.t() @ out, lora_a.dtype) if wants_out else None


# -------------------------------------------------------------------------------------------------------- registration
def recomputes(q: Tensor, groups: Sequence[Group]) -> bool:
    """Whether the groups run as matmul + softmax, whose backward computes the probabilities again."""
    return q.dtype == torch.bfloat16 and all(group[2] <= MATMUL_KEYS for group in groups)


def _groups(flat: Sequence[int]) -> list[Sequence[int]]:
    return [flat] if len(flat) == 3 else [flat[i : i + 3] for i in range(0, len(flat), 3)]


def _fake(q, kv, lora_a, heads, groups, lengths, suffix, causal):
    out = q.new_empty(q.shape[0], q.shape[1] // 3 if kv is None else q.shape[1])
    s = None if lora_a is None else q.new_empty(q.shape[0], lora_a.shape[0])
    lse = None if recomputes(q, _groups(groups)) else q.new_empty(q.shape[0], heads, dtype=backend.wide(q.dtype))
    return out, s, lse


attention_rows_forward = backend.Op(
    "attention_rows(Tensor q, Tensor? kv, Tensor? lora_a, int heads, SymInt[] groups, Tensor? lengths, SymInt suffix, "
    "bool causal) -> (Tensor, Tensor, Tensor)",
    aten=forward_aten,
    fake=_fake,
)
attention_rows_backward = backend.Op(
    "attention_rows_backward(Tensor? d_out, Tensor? d_s, Tensor q, Tensor? kv, Tensor? lora_a, Tensor? out, "
    "Tensor? lse, int heads, SymInt[] groups, Tensor? lengths, SymInt suffix, bool causal) "
    "-> (Tensor, Tensor, Tensor)",
    aten=backward_aten,
    fake=lambda d_out, d_s, q, kv, lora_a, *_: (
        torch.empty_like(q),
        None if kv is None else torch.empty_like(kv),
        None if d_s is None else torch.empty_like(lora_a),
    ),
)


# ------------------------------------------------------------------------------------------ of a Function of many steps
def attend(qkv, heads, groups, lengths, suffix, causal, differentiable):
    """out [N, D]; log-sum-exp or None; and where autograd differentiates attention its graph, `(qkv, out)`."""
    if _on_cpu(qkv) and not isinstance(groups, Ends):
        out, _, lse = attention_rows_forward(qkv, None, None, heads, groups, lengths, suffix, causal)
        return out, lse, None
    if (
        not isinstance(groups, Ends)
        and len(groups) == 3
        and groups[0]
        and uses_triton((views := _heads(qkv, None, groups[0], heads))[0], causal)
    ):
        out, lse = attention_forward(*views, lengths, suffix, causal)
        return out.transpose(1, 2).reshape(qkv.shape[0], -1), lse, None
    with torch.set_grad_enabled(differentiable):
        # Three leaves: autograd would put the gradients of views of one together in two passes, and not by rows.
        leaves = [t.detach().requires_grad_(differentiable) for t in _apart(qkv, None)]
        groups = groups if isinstance(groups, Ends) else _groups(groups)
        out = _each_group(*leaves, heads, groups, lengths, suffix, causal)
    return out.detach(), None, (leaves, out) if differentiable else None


def attend_backward(d_out, d_s, qkv, lora_a, out, lse, graph, heads, groups, lengths, suffix, causal):
    """d_qkv, and dA of the product S = out A^T whose gradient is d_s (None without one). d_out is written over."""
    if _on_cpu(qkv) and graph is None:
        operands = d_out, d_s, qkv, None, lora_a, out, lse, heads, groups, lengths, suffix, causal
        d_qkv, _, d_a = attention_rows_backward(*operands)
        return d_qkv, d_a
    if graph is not None:
        leaves, out = graph
    if d_s is not None:
        d_out.addmm_(d_s, cast(lora_a, d_s.dtype))
    if graph is not None:  # whether it is needed again is not for this Function to say
        d_qkv = torch.cat(torch.autograd.grad(out, leaves, d_out, retain_graph=True), 1)
    else:
        q, k, v = _heads(qkv, None, groups[0], heads)
        d_out, own_out = (t.view(*groups[:2], *q.shape[1::2]).transpose(1, 2) for t in (d_out, out))
        grads = attention_backward(d_out, q, k, v, lengths, own_out, lse, suffix, causal)
        d_qkv = torch.stack([t.transpose(1, 2) for t in grads], 2).view(qkv.shape)
    return d_qkv, None if d_s is None else cast(d_s.t() @ out.detach(), lora_a.dtype)


def _on_cpu(q: Tensor) -> bool:
    return q.is_cpu and backend.get_backend() != "triton"


def _apart(q, kv):
    """q [Nq, D], k and v [N, D]: views of q [N, 3 D], or of q [Nq, D] and kv [N, 2 D]."""
    if kv is None:
        return q.unflatten(1, (3, -1)).unbind(1)
    return q, *kv.unflatten(1, (2, -1)).unbind(1)


def _each_group(q, k, v, heads, groups, lengths, suffix, causal):
    """out [Nq, D], group by group through `attention`; q [Nq, D], k and v [N, D]."""
    varlen = not causal and fits_varlen(q, q.shape[1] // heads)
    if isinstance(groups, Ends):
        return by_varlen(varlen_function(), q, k, v, heads, groups) if varlen else by_mask(q, k, v, heads, groups)
    if len(groups) > 1 and varlen:
        return by_varlen(varlen_function(), q, k, v, heads, ends_of(tuple(map(tuple, groups)), q.device))
    each = [
        attention(*_by_head(parts, samples, heads), lengths, suffix=suffix, causal=causal)
        for samples, *parts in _parts(groups, (q,), (k, v))
    ]
    each = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in each]  # [samples * Sq, D]
    out = _end_to_end(each, *q.shape, q)
    return out if each else out + 0 * (q.sum() + k.sum() + v.sum())  # of nobody, but differentiable


def _by_head(parts, samples, heads):
    """[samples * S, D] -> [samples, H, S, Dh], views."""
    return [t.view(samples, -1, heads, t.shape[1] // heads).transpose(1, 2) for t in parts]


class _AttentionRows(torch.autograd.Function):
    """(out, s)"""

    @staticmethod
    def forward(ctx, q, kv, lora_a, heads, groups, lengths, suffix, causal):
        out, s, lse = attention_rows_forward(q, kv, lora_a, heads, groups, lengths, suffix, causal)
        ctx.options = heads, groups, suffix, causal
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, kv, lora_a, lengths, None if lse is None else out, lse)
        return out, s

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_out, d_s):
        if d_out is None and d_s is None:
            return (None,) * 8
        q, kv, lora_a, lengths, out, lse = ctx.saved_tensors
        heads, groups, suffix, causal = ctx.options
        operands = d_out, d_s, q, kv, lora_a, out, lse, heads, groups, lengths, suffix, causal
        grads = attention_rows_backward(*operands)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 5


# -------------------------------------------------------------------------------------------------------------- public
def attention_rows(
    q: Tensor,
    kv: Tensor | None,
    heads: int,
    groups: Sequence[Group] | Ends,
    lora_a: Tensor | None = None,
    lengths: Tensor | None = None,
    suffix: int = 0,
    causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention within each of many samples whose rows lie end to end.

    Args:
        q: [Nq, H * Dh]; or [N, 3 * H * Dh], q, k and v side by side, without `kv`.
        kv: [N, 2 * H * Dh], k and v side by side.
        heads: H.
        groups: how the rows are divided among samples, see `Group`; in order, and all of them. `Ends` instead, where
            the lengths lie on the device: not with `lengths` nor `causal`.
        lora_a: [R, H * Dh], cast to the compute dtype; None: no product.
        lengths, suffix: of a single group, as in `attention`: keys that padding hides from a graph of fixed shape.
        causal: row i sees rows up to i of its sample only.

    Returns:
        out [Nq, H * Dh] and s [Nq, R] (None without `lora_a`).

    Raises:
        ValueError: groups that do not add up to the rows.

    >>> v = torch.tensor([[1.0], [3.0], [50.0]])  # two samples, of two rows and of one
    >>> qkv = torch.cat([torch.zeros(3, 2), v], dim=1)
    >>> attention_rows(qkv, None, 1, [Group(1, 2, 2), Group(1, 1, 1)])[0].flatten()
    tensor([ 2.,  2., 50.])
    """
    chosen = backend.resolve(q, kv, lora_a, lengths)
    q, kv = backend.in_autocast_dtype(q), None if kv is None else backend.in_autocast_dtype(kv)
    _check(q, kv, heads, groups, lengths, causal)
    if q.is_cpu and chosen == "torch" and not isinstance(groups, Ends):
        flat = [size for group in groups for size in group]
        operands = q, kv, lora_a, heads, flat, lengths, suffix, causal
        if backend.needs_grad(q, kv, lora_a):
            return _AttentionRows.apply(*operands)
        return attention_rows_forward(*operands)[:2]
    out = _each_group(*_apart(q, kv), heads, groups, lengths, suffix, causal)
    return out, None if lora_a is None else F.linear(out, lora_a.to(out.dtype))


def _check(q, kv, heads, groups, lengths, causal):
    width = q.shape[1] // 3 if kv is None else q.shape[1]
    rows = q.shape[0] if kv is None else kv.shape[0]
    if q.dim() != 2 or width % heads or (q.shape[1] != 3 * width if kv is None else kv.shape[1:] != (2 * width,)):
        shapes = list(q.shape), None if kv is None else list(kv.shape)
        raise ValueError(f"q must be [N, 3 * D], or [Nq, D] beside kv [N, 2 * D], D of {heads} heads, not {shapes}")
    if isinstance(groups, Ends):
        if lengths is not None or causal:
            raise ValueError("Ends say all that attention sees of a sample: leave lengths and causal out")
        return
    if sum(g.samples * g.queries for g in groups) != q.shape[0] or sum(g.samples * g.keys for g in groups) != rows:
        raise ValueError(f"groups {list(groups)} do not add up to {q.shape[0]} rows of q and {rows} of k and v")
    if lengths is not None and len(groups) != 1:
        raise ValueError(f"lengths hide keys of a single group, not of {len(groups)}: leave the padding out instead")
