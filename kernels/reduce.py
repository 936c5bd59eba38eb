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


@jit(varying=("dropped_below", "M", "SPLIT"))
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


@jit(varying=("n", "split", "n_beside", "split_beside"))
def sum_parts(
    PARTS,  # [split, n] fp32
    OUT,  # [n]
    BESIDE,  # [split_beside, n_beside] fp32 or None: a second sum in the same launch
    OUT_BESIDE,  # [n_beside], given with BESIDE
    scale,
    n,
    split,
    n_beside,
    split_beside,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts in order. The first programs have the first sum, those after them the second."""
    pid = tl.program_id(0).to(tl.int64)
    first = tl.cdiv(n, BLOCK)
    if pid < first:
        sum_block(PARTS, OUT, pid, scale, n, split, ACC, BLOCK)
    elif BESIDE is not None:
        sum_block(BESIDE, OUT_BESIDE, pid - first, scale, n_beside, split_beside, ACC, BLOCK)


@jit
def sum_block(PARTS, OUT, block, scale, n, split, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """OUT[o] = scale * sum over the parts of PARTS[:, o], for the o of one block"""
    o = block * BLOCK + tl.arange(0, BLOCK)
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
    backend.launch(
        reduce_rows,
        (-(-c // REDUCE_TILE["BC"]), split, -(-r // block)),
        L=left,
        X=x,
        SEED=seed,
        PARTS=parts,
        dropped_below=threshold(p),
        M=m,
        C=c,
        SPLIT=split,
        R=r,
        ACC=accumulator(x.dtype),
        PRECISION=dot_precision(x.dtype),
        BR=block,
        **REDUCE_TILE,
    )
    return launch_sum_parts(parts, 1 / (1 - p), dtype)[0]


def launch_sum_parts(
    parts: Tensor,
    scale: float,
    dtype: torch.dtype,
    beside: Tensor | None = None,
    dtype_beside: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """parts [split, ...] -> scale * parts.sum(0) in `dtype`, and the same of `beside`, where given."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    out_beside = None if beside is None else beside.new_empty(beside.shape[1:], dtype=dtype_beside)
    n, n_beside, block = out.numel(), 0 if beside is None else out_beside.numel(), 1024
    backend.launch(
        sum_parts,
        (-(-n // block) + -(-n_beside // block),),
        PARTS=parts,
        OUT=out,
        BESIDE=beside,
        OUT_BESIDE=out_beside,
        scale=scale,
        n=n,
        split=parts.shape[0],
        n_beside=n_beside,
        split_beside=0 if beside is None else beside.shape[0],
        ACC=accumulator(parts.dtype),
        BLOCK=block,
        num_warps=4,
    )
    return out, out_beside
