"""Attention over samples of unequal lengths laid end to end, in one call of a GPU library's function.

    out = softmax(q k^T / sqrt(Dh)) v, sample by sample          q [Nq, H, Dh], k and v [N, H, Dh]

For attention_rows.py, whose `groups` say how the rows are divided: (samples, rows of each in q, rows of each in k).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .targets import supports_triton


@functools.cache
def varlen_function() -> Callable | None:
    """A function of sequences laid end to end: flash-attn's, or torch's own; None where there is neither."""
    for package, name in (("flash_attn", "flash_attn_varlen_func"), ("torch.nn.attention.varlen", "varlen_attn")):
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(package), name)
    return None


def fits_varlen(q: Tensor, width: int) -> bool:
    """Whether there is a varlen function that takes heads of `width` from q."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    return (
        width % 8 == 0 and width <= 256 and supports_triton(q.device, q.dtype)[0]
    )  # flash attention asks for the same


def by_varlen(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, groups: Sequence[Sequence[int]]
) -> Tensor:
    """out [Nq, D], all groups in one call; q [Nq, D], k and v [N, D]."""
    parts = [t.view(t.shape[0], heads, -1) for t in (q, k, v)]
    return function(*parts, *_ends(tuple(map(tuple, groups)), q.device)).flatten(1)


@functools.lru_cache(maxsize=64)  # every layer asks for the same
def _ends(groups: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Where each sample ends among the rows of q and of k, int32 behind a 0; and the most rows of one in each."""
    lengths = torch.tensor([(queries, keys) for samples, queries, keys in groups for _ in range(samples)])
    ends = torch.cat([lengths.new_zeros(1, 2), lengths.cumsum(0)]).to(torch.int32).t().contiguous()
    q_ends, k_ends = ends.to(device, non_blocking=True).unbind()
    return q_ends, k_ends, *lengths.amax(0).tolist()
