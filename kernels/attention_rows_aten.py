"""`attention_rows` in ATen calls, group by group, forward and backward: what runs on a CPU.

Each group runs as matmul + softmax, which backward computes again (bf16, up to 768 keys), or as ATen's flash attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import backend, products
from .attention_mask import blind_rows, hidden, in_effect, needs_mask
from .attention_matmul import MATMUL_KEYS, backward_matmul, forward_matmul, is_local
from .backend import cast

flash = torch._scaled_dot_product_flash_attention_for_cpu  # a binding of its own costs less than the operator
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def head_width(q: Tensor, kv: Tensor | None, heads: int, kv_heads: int) -> int:
    """Dh of rows of q alone, or of q, k and v side by side."""
    return q.shape[1] // (heads if kv is not None else heads + 2 * kv_heads)


def by_head(q: Tensor, kv: Tensor | None, group: Sequence, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [samples, H, Sq, Dh], k and v [samples, kv_heads, S, Dh]: views of rows [q, k, v], or of q and [k, v].

    Every size is said: -1 is none where an exported program meets no samples.
    """
    width, (samples, queries, keys) = head_width(q, kv, heads, kv_heads), group
    if kv is None:
        heads_of_rows = q.view(samples, queries, heads + 2 * kv_heads, width).transpose(1, 2)
        return heads_of_rows.split_with_sizes((heads, kv_heads, kv_heads), 1)
    k, v = kv.view(samples, keys, 2, kv_heads, width).permute(2, 0, 3, 1, 4).unbind()
    return q.view(samples, queries, heads, width).transpose(1, 2), k, v


def parts_of(
    groups: Sequence[Sequence[int]], of_queries: Sequence[Tensor | None], of_keys: Sequence[Tensor | None]
) -> Iterator:
    """(group, parts) of every group that asks: its rows of each tensor, those with a row for every query first."""
    q_at = k_at = 0
    for group in groups:
        samples, query_rows, key_rows = group
        q_end, k_end = q_at + samples * query_rows, k_at + samples * key_rows
        if q_end > q_at:
            yield group, *_from_to(of_queries, q_at, q_end), *_from_to(of_keys, k_at, k_end)
        q_at, k_at = q_end, k_end


def _from_to(tensors, start, end):
    """Rows of each; of all of them no view, whose gradient would be copied between zeros."""
    return [t if t is None or t.shape[0] == end - start else t[start:end] for t in tensors]  # len() fixes a size


def _side_by_side(t: Tensor | None) -> Tensor | None:
    """t [N, C] with columns that lie side by side: of the strides of q, k and v, flash attention knows the others."""
    return t if t is None or t.stride(1) == 1 else t.contiguous()


def _bias(q, k, *seen):
    """What is added to the scores, [B or 1, 1, Sq or 1, Sk]: -inf where a key is not seen; and rows that see none."""
    sizes = q.shape[2], k.shape[2]
    unseen, blind = hidden(*sizes, q.device, *seen), blind_rows(*sizes, *seen)
    if blind is not None:
        unseen = unseen & ~blind
    return torch.zeros_like(unseen, dtype=q.dtype).masked_fill_(unseen, float("-inf")), blind


def _flash(q, k, v, *seen):
    """(out, log-sum-exp)"""
    if q.dtype == torch.float16 and products.one_by_one(q):  # bf16 takes as long as fp32
        out, lse = products.in_fp32(lambda *qkv: _flash(*qkv, *seen), q, k, v)
        return out.to(q.dtype), lse
    if not needs_mask(q.shape[2], k.shape[2], *seen):
        return flash(q, k, v, 0.0, seen[2])
    bias, blind = _bias(q, k, *seen)
    out, lse = flash(q, k, v, 0.0, False, attn_mask=bias)
    return out if blind is None else out.masked_fill_(blind, 0), lse


def _flash_backward(d_out, q, k, v, out, lse, *seen):
    """dq, dk, dv"""
    if products.one_by_one(q):  # in fp32, which takes 0.4 times as long
        grads = products.in_fp32(lambda *given: _flash_backward(*given, *seen), d_out, q, k, v, out, lse)
        return tuple(grad.to(q.dtype) for grad in grads)
    if not needs_mask(q.shape[2], k.shape[2], *seen):
        return flash_backward(d_out, q, k, v, out, lse, 0.0, seen[2])
    bias, blind = _bias(q, k, *seen)
    d_out = d_out if blind is None else d_out.masked_fill(blind, 0)
    return flash_backward(d_out, q, k, v, out, lse, 0.0, False, attn_mask=bias)


def _seen(q, k, lengths, suffix, causal, window, positions):
    """What is seen by samples of equal length; positions [samples * S]."""
    positions = None if positions is None else positions.view(k.shape[0], -1)
    return in_effect(q.shape[2], k.shape[2], lengths, suffix, causal, window, positions)


def _attend(q, kv, positions, group, heads, kv_heads, recomputed, *seen):
    """out [rows of q, D] of samples of equal length, and log-sum-exp [samples, H, Sq], None where it is recomputed."""
    q, k, v = by_head(q, kv, group, heads, kv_heads)
    seen = _seen(q, k, *seen, positions)
    if recomputed:
        out, lse = forward_matmul(q, k, v, *seen), None
    else:
        out, lse = _flash(q, k, v, *seen)
    return out.transpose(1, 2).reshape(-1, heads * q.shape[3]), lse  # views: attention lays out its results by rows


def forward_aten(q, kv, lora_a, heads, groups, lengths, suffix, causal, kv_heads, window, positions):
    """out [Nq, D], s [Nq, R] or None, and flash attention's log-sum-exp or None: `as_flash_gives_it`."""
    q, kv, groups = _side_by_side(q), _side_by_side(kv), by_three(groups)
    recomputed = recomputes(q, groups, lengths, suffix, window, positions)
    seen = heads, kv_heads, recomputed, lengths, suffix, causal, window
    if len(groups) == 1 and min(groups[0]) > 0:
        out, lse = _attend(q, kv, positions, groups[0], *seen)
    else:
        each = [_attend(*own, group, *seen) for group, *own in parts_of(groups, (q,), (kv, positions))]
        width = heads * head_width(q, kv, heads, kv_heads)
        out = end_to_end([out for out, _ in each], q.shape[0], width, q)
        by_rows = [lse.transpose(1, 2).flatten(0, 1) for _, lse in each if lse is not None]
        lse = None if recomputed else end_to_end(by_rows, q.shape[0], heads, q, backend.wide(q.dtype))
        lse = None if lse is None else as_flash_gives_it(lse, groups)
    return out, None if lora_a is None else products.linear(out, cast(lora_a, out.dtype)), lse


def as_flash_gives_it(lse: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """[Nq, H], of a single group [samples, H, Sq]."""
    return lse if len(groups) != 1 else lse.view(*groups[0][:2], lse.shape[1]).transpose(1, 2)


def end_to_end(parts: list[Tensor], rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The parts one after the other, [rows, width]; zeros where no group asks."""
    if not parts:
        return like.new_zeros(rows, width, dtype=dtype)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_backward(d_out, q, out, lse, d_q, again, kv, positions, d_kv, group, heads, kv_heads, *seen):
    """Write d_q, d_kv (where kv is) and the result (where `again` is) of samples of equal length."""
    samples, queries, keys = group
    if out is not None:
        lse = lse.view(samples, queries, heads).transpose(1, 2)
        grads = _grads(d_out, q, kv, positions, out, lse, group, heads, kv_heads, *seen)
        if kv is None:
            torch.cat(grads, 2, out=d_q.view(samples, queries, heads + 2 * kv_heads, -1))
        else:
            d_q.view(samples, queries, heads, -1).copy_(grads[0])
            torch.cat(grads[1:], 2, out=d_kv.view(samples, keys, 2 * kv_heads, -1))
        return
    views = by_head(q, kv, group, heads, kv_heads)
    d_out, again = (None if t is None else t.view(samples, queries, heads, -1).transpose(1, 2) for t in (d_out, again))
    seen = _seen(*views[:2], *seen, positions)
    backward_matmul(d_out, *views, *seen, into=(*by_head(d_q, d_kv, group, heads, kv_heads), again))


def _grads(d_out, q, kv, positions, out, lse, group, heads, kv_heads, *seen):
    """dq, dk and dv [samples, rows, heads, Dh] by flash attention's backward; lse [samples, H, Sq]."""
    views, (samples, queries, _) = by_head(q, kv, group, heads, kv_heads), group
    width = views[0].shape[3]
    d_out = d_out.view(samples, queries, heads, width).transpose(1, 2)
    out = out.view(samples, queries, heads, width).transpose(1, 2)
    dq, dk, dv = _flash_backward(d_out, *views, out, lse, *_seen(*views[:2], *seen, positions))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def backward_aten(
    d_out, d_s, q, kv, lora_a, out, lse, heads, groups, lengths, suffix, causal, kv_heads, window, positions
):
    """d_q, d_kv (None where kv is) and dA (None without lora_a). `out` and `lse`: of flash attention."""
    q, kv, groups, wants_out = _side_by_side(q), _side_by_side(kv), by_three(groups), d_s is not None
    if wants_out:
        a = cast(lora_a, d_s.dtype)
        d_out = products.mm(d_s, a) if d_out is None else products.addmm(d_out, d_s, a)
    asked = all(samples * queries > 0 for samples, queries, _ in groups)
    seen = heads, kv_heads, lengths, suffix, causal, window
    if asked and out is not None and len(groups) == 1:
        dq, *d_kv = _grads(d_out, q, kv, positions, out, lse, groups[0], *seen)
        d_q = torch.cat((dq, *d_kv), 2).view(q.shape) if kv is None else dq.reshape(q.shape)
        d_kv = None if kv is None else torch.cat(d_kv, 2).view(kv.shape)
    else:
        made = q.new_empty if asked else q.new_zeros  # keys that nobody asks have gradients all the same
        d_q, d_kv = made(q.shape), None if kv is None else made(kv.shape)
        again = made(d_out.shape) if out is None and wants_out else None
        for group, *own in parts_of(groups, (d_out, q, out, lse, d_q, again), (kv, positions, d_kv)):
            _attend_backward(*own, group, *seen)
        out = again if out is None else out
    return d_q, d_kv, cast(products.mm(d_s.t(), out), lora_a.dtype) if wants_out else None


def recomputes(q: Tensor, groups: Sequence[Sequence[int]], lengths, suffix, window, positions) -> bool:
    """Whether the groups run as matmul + softmax, whose backward computes the probabilities again."""
    if q.dtype != torch.bfloat16 and window is None:
        return False
    local = [is_local(keys, lengths, suffix, window, positions) for _, _, keys in groups]
    if q.dtype != torch.bfloat16 and True not in local:
        return False
    return all(here or keys <= MATMUL_KEYS for here, (_, _, keys) in zip(local, groups, strict=True))


def by_three(flat: Sequence[int]) -> list[Sequence[int]]:
    return [flat] if len(flat) == 3 else [flat[i : i + 3] for i in range(0, len(flat), 3)]
