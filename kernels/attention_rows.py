"""Self-attention over rows of many samples laid end to end, and the low-rank product of its result.

    out = softmax(q k^T / sqrt(Dh) + visibility) v, sample by sample    q [Nq, H * Dh], k and v [N, kv_heads * Dh]
    s   = out A^T                                                       A = lora_a [R, H * Dh]

The rows of samples of equal length stand together: a `Group` of them is a dense [samples, rows, H, Dh] view of the
buffer, so that padding is neither stored nor masked nor computed. q may have fewer rows than k and v: only those whose
result is read. Heads are views as well; backward writes the gradients of q, k and v into one buffer. k and v may have
fewer heads, each shared by H // kv_heads heads of q (grouped-query attention); they are repeated only where a GPU has
to mask or to compute in fp32.

On a CPU ATen runs group by group, attention_rows_aten.py. On a GPU several groups are one call that takes rows as they
lie: our own where samples are short, attention_short.py, else a varlen function's, flash-attn's or torch's; a single
one, and what these do not take, is a call of `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .attention import attention, attention_backward, attention_forward, check_window, uses_triton
from .attention_mask import in_effect
from .attention_rows_aten import (
    as_flash_gives_it,
    backward_aten,
    by_head,
    by_three,
    end_to_end,
    forward_aten,
    head_width,
    parts_of,
    recomputes,
)
from .attention_short import fits_short, short_backward, short_forward
from .attention_varlen import EVERYWHERE, Ends, by_mask, by_varlen, ends_of, fits_varlen, sides_of, varlen_function
from .backend import cast


class Group(NamedTuple):
    """Samples of equal length: how many, the rows of each in q, and the rows of each in k and v.

    >>> Group(samples=3, queries=1, keys=5).keys
    5
    """

    samples: int
    queries: int
    keys: int


# -------------------------------------------------------------------------------------------------------- registration
def _fake(q, kv, lora_a, heads, groups, lengths, suffix, causal, kv_heads, window, positions):
    out = q.new_empty(q.shape[0], heads * head_width(q, kv, heads, kv_heads))
    s = None if lora_a is None else q.new_empty(q.shape[0], lora_a.shape[0])
    if recomputes(q, by_three(groups), lengths, suffix, window, positions):
        return out, s, None
    lse = q.new_empty(q.shape[0], heads, dtype=backend.wide(q.dtype))
    return out, s, as_flash_gives_it(lse, by_three(groups))


attention_rows_forward = backend.Op(
    "attention_rows(Tensor q, Tensor? kv, Tensor? lora_a, int heads, SymInt[] groups, Tensor? lengths, SymInt suffix, "
    "bool causal, int kv_heads, int? window, Tensor? positions) -> (Tensor, Tensor, Tensor)",
    aten=forward_aten,
    fake=_fake,
)
attention_rows_backward = backend.Op(
    "attention_rows_backward(Tensor? d_out, Tensor? d_s, Tensor q, Tensor? kv, Tensor? lora_a, Tensor? out, "
    "Tensor? lse, int heads, SymInt[] groups, Tensor? lengths, SymInt suffix, bool causal, int kv_heads, int? window, "
    "Tensor? positions) -> (Tensor, Tensor, Tensor)",
    aten=backward_aten,
    fake=lambda d_out, d_s, q, kv, lora_a, *_: (
        q.new_empty(q.shape),  # by rows, whatever the operands are laid out by
        None if kv is None else kv.new_empty(kv.shape),
        None if d_s is None else lora_a.new_empty(lora_a.shape),
    ),
)


# ------------------------------------------------------------------------------------------ of a Function of many steps
def attend(qkv, heads, groups, lengths, suffix, causal, kv_heads, window, positions, differentiable):
    """out [N, D]; log-sum-exp or None; and where autograd differentiates attention its graph, `(qkv, out)`."""
    kv_heads, one_length = kv_heads or heads, not isinstance(groups, Ends) and len(groups) == 3 and groups[0] > 0
    if runs_on_cpu(qkv, groups):
        operands = qkv, None, None, heads, groups, lengths, suffix, causal, kv_heads, window, positions
        out, _, lse = attention_rows_forward(*operands)
        return out, lse, None
    seen = lengths, suffix, causal, window, positions
    if one_length:
        views, own = by_head(qkv, None, groups, heads, kv_heads), in_effect(*groups[1:], *seen)
        if uses_triton(*views[:2], *own[2:4]):
            out, lse = attention_forward(*views, *own)
            return out.transpose(1, 2).reshape(qkv.shape[0], -1), lse, None
    groups = groups if isinstance(groups, Ends) else by_three(groups)
    if (short := _short(qkv, head_width(qkv, None, heads, kv_heads), groups, *seen)) is not None:
        return *short_forward(*_apart(qkv, None, heads, kv_heads), heads, kv_heads, *short), None
    with torch.set_grad_enabled(differentiable):
        # Three leaves: autograd would put the gradients of views of one together in two passes, and not by rows.
        leaves = [t.detach().requires_grad_(differentiable) for t in _apart(qkv, None, heads, kv_heads)]
        out = _each_group(*leaves, heads, kv_heads, groups, *seen)
    return out.detach(), None, (leaves, out) if differentiable else None


def attend_backward(
    d_out, d_s, qkv, lora_a, out, lse, graph, heads, groups, lengths, suffix, causal, kv_heads, window, positions
):
    """d_qkv, and dA of the product S = out A^T whose gradient is d_s (None without one). d_out is written over."""
    kv_heads = kv_heads or heads
    if runs_on_cpu(qkv, groups):
        seen = lengths, suffix, causal, kv_heads, window, positions
        d_qkv, _, d_a = attention_rows_backward(d_out, d_s, qkv, None, lora_a, out, lse, heads, groups, *seen)
        return d_qkv, d_a
    if graph is not None:
        leaves, out = graph
    if d_s is not None:
        d_out.addmm_(d_s, cast(lora_a, d_s.dtype))
    if graph is not None:  # whether it is needed again is not for this Function to say
        d_qkv = torch.cat(torch.autograd.grad(out, leaves, d_out, retain_graph=True), 1)
    elif isinstance(groups, Ends) or len(groups) > 3:
        groups = groups if isinstance(groups, Ends) else by_three(groups)
        seen = lengths, suffix, causal, window, positions
        short = _short(qkv, head_width(qkv, None, heads, kv_heads), groups, *seen)
        d_qkv, _ = _short_grads(d_out, qkv, None, out, lse, heads, kv_heads, *short)
    else:
        q, k, v = by_head(qkv, None, groups, heads, kv_heads)
        d_out, own_out = (t.view(*groups[:2], *q.shape[1::2]).transpose(1, 2) for t in (d_out, out))
        _, *seen = in_effect(*groups[1:], lengths, suffix, causal, window, positions)
        grads = attention_backward(d_out, q, k, v, lengths, own_out, lse, *seen)
        d_qkv = torch.cat([t.transpose(1, 2) for t in grads], 2).view(qkv.shape)
    return d_qkv, None if d_s is None else cast(d_s.t() @ out.detach(), lora_a.dtype)


def runs_on_cpu(q: Tensor, groups: Sequence | Ends) -> bool:
    """Whether attention runs as attention_rows_aten.py does it, with a backward of its own."""
    return q.is_cpu and backend.get_backend() != "triton" and not isinstance(groups, Ends)


def _short(q, width, groups, *seen):
    """Where samples of unequal lengths end and what a row sees; None where attention_short.py does not take them."""
    if torch.compiler.is_compiling():
        return None
    if isinstance(groups, Ends):
        _refuse_hidden(groups, *seen)
        return (groups, EVERYWHERE) if fits_short(q, width, groups) else None
    if len(groups) < 2 or (sides := sides_of(groups, *seen)) is None:
        return None
    ends = ends_of(tuple(map(tuple, groups)), q.device)
    return (ends, sides) if fits_short(q, width, ends) else None


def _refuse_hidden(ends, *seen):
    lengths, _, causal, window, _ = in_effect(ends.most_queries, ends.most_keys, *seen)
    if lengths is not None or causal or window is not None:
        raise ValueError("Ends say all that attention sees of a sample: leave lengths, causal and window out")


def _apart(q, kv, heads, kv_heads):
    """q [Nq, H * Dh], k and v [N, kv_heads * Dh]: views of q, k and v side by side, or of q and of k and v."""
    if kv is not None:
        return q, *kv.chunk(2, 1)
    width = head_width(q, None, heads, kv_heads)
    return q.split_with_sizes((heads * width, kv_heads * width, kv_heads * width), 1)


def _each_group(q, k, v, heads, kv_heads, groups, *seen):
    """out [Nq, D], group by group through `attention`; q [Nq, H * Dh], k and v [N, kv_heads * Dh]."""
    lengths, suffix, causal, window, positions = seen
    width, operands = q.shape[1] // heads, (q, k, v, heads, kv_heads)
    if isinstance(groups, Ends):
        _refuse_hidden(groups, *seen)
        return by_varlen(varlen_function(), *operands, groups) if fits_varlen(q, width) else by_mask(*operands, groups)
    if len(groups) > 1 and (sides := sides_of(groups, *seen)) is not None and fits_varlen(q, width):
        return by_varlen(varlen_function(), *operands, ends_of(tuple(map(tuple, groups)), q.device), sides)
    each = []
    for (samples, *rows), *parts, at in parts_of(groups, (q,), (k, v, positions)):
        at = None if at is None else at.view(samples, rows[1])
        parts = [_by_width(t, samples, n, width) for t, n in zip(parts, (rows[0], rows[1], rows[1]), strict=True)]
        each.append(attention(*parts, lengths, suffix, 0, causal, window, at))
    each = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in each]  # [samples * Sq, D]
    out = end_to_end(each, *q.shape, q)
    return out if each else out + 0 * (q.sum() + k.sum() + v.sum())  # of nobody, but differentiable


def _by_width(t, samples, rows, width):
    """[samples * S, heads * Dh] -> [samples, heads, S, Dh], a view; of no samples too, as in an export."""
    return t.view(samples, rows, t.shape[1] // width, width).transpose(1, 2)


class _AttentionRows(torch.autograd.Function):
    """(out, s)"""

    @staticmethod
    def forward(ctx, q, kv, lora_a, heads, groups, lengths, suffix, causal, kv_heads, window, positions):
        seen = suffix, causal, kv_heads, window
        out, s, lse = attention_rows_forward(q, kv, lora_a, heads, groups, lengths, *seen, positions)
        ctx.options = heads, groups, seen
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, kv, lora_a, None if lse is None else out, lse, lengths, positions)
        return out, s

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_out, d_s):
        if d_out is None and d_s is None:
            return (None,) * 11
        *operands, lengths, positions = ctx.saved_tensors
        heads, groups, seen = ctx.options
        grads = attention_rows_backward(d_out, d_s, *operands, heads, groups, lengths, *seen, positions)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:3], strict=True)), *[None] * 8


class _ShortRows(torch.autograd.Function):
    """out [Nq, H * Dh]"""

    @staticmethod
    def forward(ctx, q, kv, heads, kv_heads, *short):
        q, kv = backend.contiguous(q, kv)
        out, lse = short_forward(*_apart(q, kv, heads, kv_heads), heads, kv_heads, *short)
        ctx.options = heads, kv_heads, *short
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_out):
        q, kv, out, lse = ctx.saved_tensors
        return *_short_grads(d_out, q, kv, out, lse, *ctx.options), *[None] * 4


def _short_grads(d_out, q, kv, out, lse, heads, kv_heads, *short):
    """Gradients of q, which may have k and v beside it, and of kv."""
    d_q, d_kv = torch.empty_like(q), None if kv is None else torch.empty_like(kv)
    each, d_each = (_apart(*given, heads, kv_heads) for given in ((q, kv), (d_q, d_kv)))
    short_backward(d_out, *each, out, lse, *d_each, heads, kv_heads, *short)
    return d_q, d_kv


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
    kv_heads: int | None = None,
    window: int | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention within each of many samples whose rows lie end to end.

    Args:
        q: [Nq, H * Dh]; or [N, (H + 2 * kv_heads) * Dh], q, k and v side by side, without `kv`.
        kv: [N, 2 * kv_heads * Dh], k and v side by side.
        heads: H.
        groups: how the rows are divided among samples, see `Group`; in order, and all of them. `Ends` instead, where
            the lengths lie on the device: not with `lengths`, `causal` or a window shorter than the samples.
        lora_a: [R, H * Dh], cast to the compute dtype; None: no product.
        lengths: of a single group, as in `attention`: keys that padding hides from a graph of fixed shape.
        suffix: the last rows of each sample, which neither `lengths` nor `window` hides.
        causal: a row sees none after itself. The queries of a sample are its last rows: the last sees all keys.
        kv_heads: heads of k and v, a divisor of H; head i of q reads head i // (H // kv_heads). None: H.
        window: token rows see token rows at a distance of at most `window`; suffix rows see and are seen as without.
            Every row must ask. A sample no longer than window + 1 costs nothing, a longer one a mask [S, S].
        positions: int64 [N], what distances are of, a mask for each sample; None: the order of the rows.

    Returns:
        out [Nq, H * Dh] and s [Nq, R] (None without `lora_a`).

    Raises:
        ValueError: groups that do not add up to the rows, queries without keys, widths that do not divide into the
            heads, a window where not all rows ask.

    >>> v = torch.tensor([[1.0], [3.0], [50.0]])  # two samples, of two rows and of one
    >>> qkv = torch.cat([torch.zeros(3, 2), v], dim=1)
    >>> attention_rows(qkv, None, 1, [Group(1, 2, 2), Group(1, 1, 1)])[0].flatten()
    tensor([ 2.,  2., 50.])
    """
    chosen = backend.resolve(q, kv, lora_a, lengths, positions)
    q, kv = backend.in_autocast_dtype(q), None if kv is None else backend.in_autocast_dtype(kv)
    kv_heads = heads if kv_heads is None else kv_heads
    _check(q, kv, lora_a, heads, kv_heads, groups)
    if not isinstance(groups, Ends):
        _check_groups(q, kv, groups, lengths, suffix, causal)
    if window is not None:
        rows = q.shape[:1] if kv is None else kv.shape[:1]
        check_window(window, positions, rows, isinstance(groups, Ends) or all(g[1] == g[2] for g in groups))
    if q.is_cpu and chosen == "torch" and not isinstance(groups, Ends):
        flat = [size for group in groups for size in group]
        operands = q, kv, lora_a, heads, flat, lengths, suffix, causal, kv_heads, window, positions
        if backend.needs_grad(q, kv, lora_a):
            return _AttentionRows.apply(*operands)
        return attention_rows_forward(*operands)[:2]
    seen = lengths, suffix, causal, window, positions
    if (short := _short(q, head_width(q, kv, heads, kv_heads), groups, *seen)) is not None:
        out = _ShortRows.apply(q, kv, heads, kv_heads, *short)
    else:
        out = _each_group(*_apart(q, kv, heads, kv_heads), heads, kv_heads, groups, *seen)
    return out, None if lora_a is None else F.linear(out, lora_a.to(out.dtype))


def _check(q, kv, lora_a, heads, kv_heads, groups):
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {heads} heads of q, not be {kv_heads}: choose a divisor, or None")
    if not q.is_floating_point() or (kv is not None and kv.dtype != q.dtype):
        raise TypeError(
            f"q and kv must have one floating point dtype, not {q.dtype} and {kv if kv is None else kv.dtype}"
        )
    of_row = heads + 2 * kv_heads if kv is None else heads
    width = q.shape[1] // of_row if q.dim() == 2 else 0
    fits = width > 0 and q.shape[1] == of_row * width
    if not fits or (kv is not None and (kv.dim() != 2 or kv.shape[1] != 2 * kv_heads * width)):
        shapes = list(q.shape), None if kv is None else list(kv.shape)
        raise ValueError(
            f"q must be [N, {heads + 2 * kv_heads} * Dh], or [Nq, {heads} * Dh] beside kv [N, {2 * kv_heads} * Dh], "
            f"for {heads} heads and {kv_heads} of k and v, not {shapes}"
        )
    if lora_a is not None and (lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != heads * width):
        raise ValueError(f"lora_a must be [R, {heads * width}] like the result, R at least 1, not {list(lora_a.shape)}")


def _check_groups(q, kv, groups, lengths, suffix, causal):
    rows, asked = q.shape[0] if kv is None else kv.shape[0], [g for g in groups if g[0] * g[1] > 0]
    if sum(g[0] * g[1] for g in groups) != q.shape[0] or sum(g[0] * g[2] for g in groups) != rows:
        raise ValueError(f"groups {list(groups)} do not add up to {q.shape[0]} rows of q and {rows} of k and v")
    if any(min(g) < 0 for g in groups):
        raise ValueError(f"groups are counts of samples and of their rows, not {list(groups)}")
    if any(g[2] == 0 for g in asked):
        raise ValueError(f"queries need keys: give the samples of each group rows of k and v, unlike in {list(groups)}")
    if lengths is not None and len(groups) != 1:
        raise ValueError(f"lengths hide keys of a single group, not of {len(groups)}: leave the padding out instead")
    if lengths is not None and (lengths.shape != (groups[0][0],) or lengths.dtype not in (torch.int32, torch.int64)):
        given = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"lengths must be {[groups[0][0]]} integers, one for each sample of the group, not {given}")
    if suffix < 0 or any(g[2] < suffix for g in asked):
        raise ValueError(f"suffix must count rows of every sample, not be {suffix} for {list(groups)}")
    if causal and any(g[1] > g[2] for g in asked):
        raise ValueError(
            f"the queries of a causal sample are its last rows, so no more than keys, unlike in {list(groups)}"
        )
