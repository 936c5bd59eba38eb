"""Sums over rows in two stages and a fixed order: fp32 partial sums of row ranges, then the partial sums. No atomics.

reduce_rows   L^T (mask X)       L [M, R], X [M, C] -> [R, C]
sum_parts     scale * sum of parts [SPLIT, ...]
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .backend import jit, tl
from .dropout import kept_tile, threshold
from .tiling import accumulator, dot_precision, rank_tile

REDUCE_TILE = {"BM": 64, "BC": 128, "num_warps": 4, "num_stages": 3}
MOST_SPLITS = 32


@jit
def reduce_rows(
    L,  # [M, R]
    X,  # [M, C]
    SEED,  # [] int64 or None
    PARTS,  # [SPLIT, R, C] fp32
    dropped_below,
    M,
    C,
    SPLIT,
    R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """Each program owns BC columns, BR rows of the result and one range of the M rows, and so one place in PARTS."""
    rc = tl.program_id(0) * BC + tl.arange(0, BC)
    rr = tl.program_id(2) * BR + tl.arange(0, BR)
    split = tl.program_id(1)
    rm = tl.arange(0, BM)
    rows = tl.cdiv(tl.cdiv(M, BM), SPLIT) * BM
    acc = tl.zeros((BR, BC), ACC)
    for m in range(split * rows, min((split + 1) * rows, M), BM):
        r = m + rm
        ok = r < M
        left = tl.load(L + r[None, :].to(tl.int64) * R + rr[:, None], mask=ok[None, :] & (rr < R)[:, None], other=0.0)
        x = tl.load(X + r[:, None].to(tl.int64) * C + rc[None, :], mask=ok[:, None] & (rc < C)[None, :], other=0.0)
        if SEED is not None:
            x = tl.where(kept_tile(SEED, r, rc, dropped_below), x, 0)
        acc = tl.dot(left, x, acc, out_dtype=ACC, input_precision=PRECISION)
    place = PARTS + split.to(tl.int64) * R * C + rr[:, None] * C + rc[None, :]
    tl.store(place, acc, mask=(rr < R)[:, None] & (rc < C)[None, :])


@jit
def sum_parts(
    PARTS,  # [split, n] fp32
    OUT,  # [n]
    scale,
    n,
    split,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), ACC)
    for i in range(split):
        acc += tl.load(PARTS + tl.cast(i, tl.int64) * n + o, mask=o < n, other=0.0)
    tl.store(OUT + o, (acc * scale).to(OUT.dtype.element_ty), mask=o < n)


def splits(rows: int, ranks: int) -> int:
    """Row ranges of a two-stage sum: the partial sums stay below a quarter of what is read, a range fills a tile."""
    return max(1, min(MOST_SPLITS, rows // (16 * ranks), rows // REDUCE_TILE["BM"]))


def launch_reduce_rows(left: Tensor, x: Tensor, dtype: torch.dtype, p: float = 0.0, seed: Tensor | None = None):
    """left [M, R], x [M, C] -> left^T (mask x) / (1 - p) [R, C] in `dtype`."""
    (m, r), c = left.shape, x.shape[1]
    split, block = splits(m, r), rank_tile(r)
    parts = x.new_empty(split, r, c, dtype=backend.wide(x.dtype))
    grid = (-(-c // REDUCE_TILE["BC"]), split, -(-r // block))
    backend.launch(
        reduce_rows,
        grid,
        *(left, x, seed, parts, threshold(p), m, c, split),
        R=r,
        ACC=accumulator(x.dtype),
        PRECISION=dot_precision(),
        BR=block,
        **REDUCE_TILE,
    )
    return launch_sum_parts(parts, 1 / (1 - p), dtype)


def launch_sum_parts(parts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """parts [split, ...] -> scale * parts.sum(0) in `dtype`."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    n, block = out.numel(), 1024
    grid = (-(-n // block),)
    acc = accumulator(parts.dtype)
    backend.launch(sum_parts, grid, parts, out, scale, n, parts.shape[0], ACC=acc, BLOCK=block, num_warps=4)
    return out
