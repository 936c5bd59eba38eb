"""Attention as products and a softmax: on a CPU faster than SDPA both ways in bf16, up to 768 keys, and behind windows.

    p = softmax(q k^T / sqrt(Dh) + bias), out = p v          q [B, H, Sq, Dh], k and v [B, kv_heads, S, Dh]
    dv = p^T dout, ds = p (dp - sum(dp p)), dp = dout v^T, dq = ds k / sqrt(Dh), dk = ds^T q / sqrt(Dh)

Some (sample, head) pairs at a time, whose probabilities fit into a cache; backward computes them again. Behind a window
much shorter than the sample a block of queries meets the keys around it alone, and the suffix rows: at 2,048 rows and a
window of 64, a third to a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import backend, products
from .attention_mask import blind_rows, hidden_by_lengths, hidden_by_place
from .chunks import in_cache

MATMUL_KEYS = 768
CHUNK_BYTES = 2**20  # of probabilities at a time for each thread: what the second-level cache of its core holds
BLOCK = 128  # queries that share their keys behind a window
WORTH = 3  # times the keys of a block: shorter samples take less time in one piece


def fits_matmul(q: Tensor, keys: int, lengths, suffix: int, window: int | None, positions) -> bool:
    """Whether this is the way on a CPU; no more than that many keys, or a window."""
    return is_local(keys, lengths, suffix, window, positions) or (q.dtype == torch.bfloat16 and keys <= MATMUL_KEYS)


def is_local(keys: int, lengths, suffix: int, window: int | None, positions) -> bool:
    """Whether a block of queries needs so few of the keys that blocks are worth their trouble."""
    known = window is not None and lengths is None and positions is None
    return known and keys - suffix > WORTH * (2 * window + BLOCK)


# ------------------------------------------------------------------------------------------------------------ all keys
def _pairs(t: Tensor, sharing: int = 1) -> Tensor:
    """[B, H, S, Dh] -> [B * H // sharing, sharing * S, Dh], contiguous: heads that share a key are rows of one pair."""
    pairs = t.flatten(0, 1).contiguous()
    return pairs if sharing == 1 else pairs.view(len(pairs) // sharing, -1, t.shape[3])


def _chunks(q: Tensor, k: Tensor, biases: list[Tensor]):
    """Slices of the pairs, and what is added to the scores of each."""
    pairs = size = q.shape[0]
    if in_cache(q):
        size = _chunk_size(pairs, q.shape[1] * k.shape[1] * q.element_size())
    for i in range(0, pairs, max(1, size)):
        chunk = slice(i, i + size)
        yield chunk, [_of_pairs(bias, chunk, pairs) for bias in biases]


def _chunk_size(pairs: int, nbytes: int) -> int:
    """How many pairs with so many bytes of probabilities each go at a time: chunks of one size, as many a thread."""
    threads = torch.get_num_threads()
    most = max(1, CHUNK_BYTES * threads // max(1, nbytes))
    size = -(-pairs // max(1, -(-pairs // most)))
    return max(1, -(-size // threads) * threads)


def _of_pairs(bias: Tensor, chunk: slice, pairs: int) -> Tensor:
    """Of one bias for all pairs, of one for each, or of one for each sample: those of some pairs."""
    if len(bias) in (1, pairs):
        return bias if len(bias) == 1 else bias[chunk]
    return bias[torch.arange(pairs, device=bias.device)[chunk] // (pairs // len(bias))]


def _biases(q, k, lengths, suffix, causal, window, positions):
    """What is added to scores, [pairs, B or 1, Sq or 1, Sk]: half of the lowest number where one does not count, or 0.

    Two of them add up to a finite number, and filling scores by a bool mask takes six times as long.
    """
    masks = []
    if lengths is not None:
        padding = hidden_by_lengths(lengths, k.shape[2], suffix)
        masks.append(padding.expand(-1, k.shape[1], -1, -1).flatten(0, 1))
    if causal or window is not None:
        masks.append(hidden_by_place(q.shape[2], k.shape[2], q.device, suffix, causal, window, positions)[:, 0])
    return [mask.to(q.dtype) * (torch.finfo(q.dtype).min / 2) for mask in masks]


def _probabilities(q, k, biases):
    """softmax(q k^T / sqrt(Dh)): q [n, heads of a key * Sq, Dh], k [n, Sk, Dh] -> [n, heads of a key * Sq, Sk]."""
    start, *others = [_of_rows(bias, *q.shape[:2]) for bias in biases] or [q.new_empty(())]
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=int(start.dim() > 0), alpha=q.shape[2] ** -0.5)
    for bias in others:
        scores += bias
    return torch.softmax(scores, -1)


def _of_rows(bias: Tensor, pairs: int, rows: int) -> Tensor:
    """[n or 1, Sq or 1, Sk] -> [n, heads of a key * Sq, Sk]"""
    return bias[:, None].expand(pairs, rows // bias.shape[1], -1, -1).flatten(1, 2)


def _rows_first(pairs: Tensor, shape, into: Tensor | None = None) -> Tensor:
    """[B * H, S, Dh] -> [B, H, S, Dh]: `into` a view, or laid out by rows, as the next linear layer reads it."""
    heads = pairs.view(shape)
    return heads.transpose(1, 2).contiguous().transpose(1, 2) if into is None else into.copy_(heads)


def _laid_out(grads: Sequence[Tensor | None], shapes, into) -> tuple[Tensor, ...]:
    return tuple(_rows_first(*each) for each in zip(grads, shapes, into, strict=True) if each[0] is not None)


def forward_matmul(q, k, v, *seen):
    if products.one_by_one(q):
        return products.in_fp32(lambda *qkv: forward_matmul(*qkv, *seen), q, k, v).to(q.dtype)
    lengths, suffix, causal, window, positions = seen
    if is_local(k.shape[2], lengths, suffix, window, positions):
        return _forward_local(q, k, v, suffix, causal, window)
    biases, blind, shape = _biases(q, k, *seen), blind_rows(q.shape[2], k.shape[2], *seen), q.shape
    q, k, v = _pairs(q, shape[1] // k.shape[1]), _pairs(k), _pairs(v)
    out = torch.empty_like(q)
    for s, added in _chunks(q, k, biases):
        torch.bmm(_probabilities(q[s], k[s], added), v[s], out=out[s])
    if blind is not None:
        out.view(shape).masked_fill_(blind, 0)
    return _rows_first(out, shape)


def backward_matmul(d_out, q, k, v, *seen, into=(None, None, None, None)):
    """dq, dk, dv, written into views of their shapes where these are given; so is the forward's result, into a fourth.

    The probabilities are computed again.
    """
    if products.one_by_one(q):
        grads = products.in_fp32(lambda *given: backward_matmul(*given, *seen, into=into), d_out, q, k, v)
        return tuple(grad.to(q.dtype) for grad in grads)
    lengths, suffix, causal, window, positions = seen
    if is_local(k.shape[2], lengths, suffix, window, positions):
        return _backward_local(d_out, q, k, v, suffix, causal, window, into)
    biases, blind = _biases(q, k, *seen), blind_rows(q.shape[2], k.shape[2], *seen)
    shapes, scale = (q.shape, k.shape, v.shape), q.shape[3] ** -0.5
    d_out = d_out if blind is None else d_out.masked_fill(blind, 0)
    sharing = q.shape[1] // k.shape[1]
    q, k, v, d_out = _pairs(q, sharing), _pairs(k), _pairs(v), _pairs(d_out, sharing)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    out = None if into[3] is None else torch.empty_like(q)
    none = q.new_empty(())
    for s, added in _chunks(q, k, biases):
        p = _probabilities(q[s], k[s], added)
        if out is not None:
            torch.bmm(p, v[s], out=out[s])
        torch.bmm(p.transpose(1, 2), d_out[s], out=dv[s])
        dp = torch.bmm(d_out[s], v[s].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        torch.baddbmm(none, ds, k[s], beta=0, alpha=scale, out=dq[s])
        torch.baddbmm(none, ds.transpose(1, 2), q[s], beta=0, alpha=scale, out=dk[s])
    if out is not None and blind is not None:
        out.view(shapes[0]).masked_fill_(blind, 0)
    return _laid_out((dq, dk, dv, out), (*shapes, shapes[0]), into)


# ------------------------------------------------------------------------------------------------------ behind a window
def _tiles(queries: int, keys: int, suffix: int, causal: bool, window: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of q, and the rows of k that some of them see. Queries are the last of the rows."""
    tokens, first = keys - suffix, keys - queries  # `first`: the place of the first query
    own = max(0, tokens - first)  # queries that are token rows
    for start, end in pairwise((*range(0, own, BLOCK), own)):
        around = slice(max(0, first + start - window), min(tokens, first + end + (0 if causal else window)))
        yield slice(start, end), [around] if causal or suffix == 0 else [around, slice(tokens, keys)]
    if own < queries:
        yield slice(own, queries), [slice(0, keys)]


def _bias_of(queries: slice, parts: list[slice], like, keys: int, first: int, suffix: int, causal: bool, window: int):
    """As `_biases`, of a tile, [1, queries, keys of the parts]."""
    place = torch.arange(keys, device=like.device)
    own, other = place[queries.start + first : queries.stop + first, None], torch.cat([place[part] for part in parts])
    tokens = keys - suffix
    far = ((own - other).abs() > window) & (own < tokens) & (other < tokens)
    return (far | (own < other) if causal else far).to(like.dtype)[None] * (torch.finfo(like.dtype).min / 2)


def _local_chunks(q: Tensor, k: Tensor, suffix: int, causal: bool, window: int):
    """Pairs, rows of q, parts of the rows of k, bias: of every piece of work. q [pairs, heads of a key, Sq, Dh]."""
    pairs, sharing, queries, _ = q.shape
    keys = k.shape[1]
    for rows, parts in _tiles(queries, keys, suffix, causal, window):
        bias = _bias_of(rows, parts, q, keys, keys - queries, suffix, causal, window)
        size = _chunk_size(pairs, sharing * bias.numel() * q.element_size())
        for i in range(0, pairs, size):
            yield slice(i, i + size), rows, parts, [bias]


def _gather(t: Tensor, parts: list[slice]) -> Tensor:
    """[n, S, Dh] -> [n, rows of the parts, Dh]"""
    return t[:, parts[0]] if len(parts) == 1 else torch.cat([t[:, part] for part in parts], 1)


def _scatter(total: Tensor, parts: list[slice], added: Tensor) -> None:
    for own, t in zip(parts, added.split([part.stop - part.start for part in parts], 1), strict=True):
        total[:, own] += t


def _by_key(t: Tensor, sharing: int) -> Tensor:
    """[B, H, S, Dh] -> [B * H // sharing, sharing, S, Dh]"""
    return t.contiguous().view(-1, sharing, *t.shape[2:])


def _forward_local(q, k, v, suffix, causal, window):
    shape = q.shape
    q, k, v = _by_key(q, shape[1] // k.shape[1]), _pairs(k), _pairs(v)
    out = torch.empty_like(q)
    for s, rows, parts, bias in _local_chunks(q, k, suffix, causal, window):
        own = q[s, :, rows]
        p = _probabilities(own.flatten(1, 2), _gather(k[s], parts), bias)
        out[s, :, rows] = torch.bmm(p, _gather(v[s], parts)).view(own.shape)
    return _rows_first(out, shape)


def _backward_local(d_out, q, k, v, suffix, causal, window, into):
    shapes, scale, sharing = (q.shape, k.shape, v.shape), q.shape[3] ** -0.5, q.shape[1] // k.shape[1]
    q, d_out, k, v = _by_key(q, sharing), _by_key(d_out, sharing), _pairs(k), _pairs(v)
    dq, out = torch.empty_like(q), None if into[3] is None else torch.empty_like(q)
    dk, dv = (torch.zeros_like(t, dtype=backend.wide(t.dtype)) for t in (k, v))  # keys gather from several blocks
    none = q.new_empty(())
    for s, rows, parts, bias in _local_chunks(q, k, suffix, causal, window):
        own, d = q[s, :, rows].flatten(1, 2), d_out[s, :, rows].flatten(1, 2)
        keys, values, shape = _gather(k[s], parts), _gather(v[s], parts), q[s, :, rows].shape
        p = _probabilities(own, keys, bias)
        if out is not None:
            out[s, :, rows] = torch.bmm(p, values).view(shape)
        _scatter(dv[s], parts, torch.bmm(p.transpose(1, 2), d))
        ds = torch.ops.aten._softmax_backward_data(torch.bmm(d, values.transpose(1, 2)), p, -1, p.dtype)
        dq[s, :, rows] = torch.baddbmm(none, ds, keys, beta=0, alpha=scale).view(shape)
        _scatter(dk[s], parts, torch.baddbmm(none, ds.transpose(1, 2), own, beta=0, alpha=scale))
    return _laid_out((dq, dk.to(k.dtype), dv.to(v.dtype), out), (*shapes, shapes[0]), into)
