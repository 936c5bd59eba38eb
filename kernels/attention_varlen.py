"""Attention over samples of unequal lengths laid end to end, in one call of a GPU library's function.

    out = softmax(q k^T / sqrt(Dh)) v, sample by sample          q [Nq, H, Dh], k and v [N, kv_heads, Dh]

For attention_rows.py, whose `groups` say how the rows are divided: (samples, rows of each in q, rows of each in k), or
whose `Ends` do, where a graph of fixed shapes must not know the lengths.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import sdpa
from .attention_mask import in_effect
from .targets import supports_triton

EVERYWHERE = (-1, -1)  # the sides of a row that sees all keys


class Ends(NamedTuple):
    """Samples whose lengths only the device knows: where each ends among the rows. Every row belongs to one.

    >>> Ends(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3]), most_queries=2, most_keys=2).most_keys
    2
    """

    queries: Tensor  # [samples + 1] int32, from 0 on
    keys: Tensor  # [samples + 1] int32
    most_queries: int  # no sample has more rows in q
    most_keys: int


@functools.cache
def varlen_function() -> Callable | None:
    """A function of sequences laid end to end: flash-attn's, or torch's own; None where there is neither."""
    for package, name in (("flash_attn", "flash_attn_varlen_func"), ("torch.nn.attention.varlen", "varlen_attn")):
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(package), name)
    return None


def fits_varlen(q: Tensor, width: int) -> bool:
    """Whether there is a varlen function that takes heads of `width` from q."""
    if not q.is_cuda or torch.compiler.is_compiling() or varlen_function() is None:
        return False
    fits = width % 8 == 0 and width <= 256  # flash attention asks for the same
    return fits and supports_triton(q.device, q.dtype)[0]


@functools.cache
def _takes(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def sides_of(groups, lengths, suffix, causal, window, positions) -> tuple[int, int] | None:
    """How many keys a row sees on either side of it, -1 for all; None where that is not all there is to say."""
    if lengths is not None:
        return None
    if all(in_effect(queries, keys, None, suffix, causal, window, positions)[3] is None for _, queries, keys in groups):
        return -1, 0 if causal else -1
    return (window, 0 if causal else window) if suffix == 0 and positions is None else None


def by_varlen(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, ends: Ends, sides=EVERYWHERE
) -> Tensor:
    """out [Nq, D], all samples in one call; q [Nq, H * Dh], k and v [N, kv_heads * Dh]. Queries are a sample's last."""
    k, v = (t.view(t.shape[0], kv_heads, -1) for t in (k, v))
    options = {} if sides == EVERYWHERE else {"window_size": sides}
    if kv_heads < heads and _takes(function, "enable_gqa"):  # others share heads without a word
        options["enable_gqa"] = True
    return function(q.view(q.shape[0], heads, -1), k, v, *ends, **options).flatten(1)


def by_mask(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, ends: Ends) -> Tensor:
    """The same where there is no varlen function: every row is multiplied with every other, and most are hidden."""
    of_query, of_key = (
        torch.searchsorted(each, torch.arange(len(t), device=t.device, dtype=each.dtype), right=True)
        for each, t in ((ends.queries, q), (ends.keys, k))
    )
    q = q.view(1, q.shape[0], heads, -1).transpose(1, 2)  # [1, H, Nq, Dh]
    k, v = (t.view(1, t.shape[0], kv_heads, -1).transpose(1, 2) for t in (k, v))
    out = sdpa(q, k, v, of_query[:, None] == of_key)
    return out.transpose(1, 2).flatten(2)[0]


@functools.lru_cache(maxsize=64)  # every layer asks for the same
def ends_of(groups: tuple[tuple[int, int, int], ...], device: torch.device) -> Ends:
    """Where the samples of these groups end."""
    lengths = torch.tensor([(queries, keys) for samples, queries, keys in groups for _ in range(samples)])
    ends = torch.cat([lengths.new_zeros(1, 2), lengths.cumsum(0)]).to(torch.int32).t().contiguous()
    q_ends, k_ends = ends.to(device, non_blocking=True).unbind()
    return Ends(q_ends, k_ends, *lengths.amax(0).tolist())
