"""Rows in pieces: on a CPU, what one op writes is still in cache when the next one reads it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHUNK = 1 << 19  # elements taken in fp32 at a time: more fall out of cache, fewer wait for their threads
CHUNK_OF_CORE = 1 << 17  # elements a core takes at a time where many ops follow each other: they stay in its cache


def flat(t: Tensor | None) -> Tensor | None:
    """[..., C] -> [M, C]; says M, which a view of no elements does not."""
    if t is None or t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def row_chunks(t: Tensor) -> list[slice]:
    """Slices of the rows of t [M, N] to go through in turn; one of all rows where no cache of a CPU is spared."""
    return _slices(t, CHUNK)


def row_chunks_by_core(t: Tensor) -> list[slice]:
    """As `row_chunks`, of as many elements as all cores hold together; a compiler makes one pass by itself."""
    return [slice(None)] if torch.compiler.is_compiling() else _slices(t, CHUNK_OF_CORE * torch.get_num_threads())


def _slices(t: Tensor, elements: int) -> list[slice]:
    step = max(1, elements // max(1, t.shape[1]) if in_cache(t) else t.shape[0])
    return [slice(i, i + step) for i in range(0, t.shape[0], step)]


def in_cache(t: Tensor) -> bool:
    """Whether t lies in a CPU's memory: on a GPU a launch costs more than a pass, and a plan only counts bytes."""
    return t.is_cpu and type(t) is not FakeTensor


def chunk_buffer(t: Tensor, chunks: list[slice], dtype: torch.dtype) -> Tensor:
    """Room for the rows of any chunk: one for all, since fresh memory costs more than the arithmetic on it."""
    return t.new_empty(min(chunks[0].stop, len(t)) if chunks else 0, t.shape[1], dtype=dtype)
