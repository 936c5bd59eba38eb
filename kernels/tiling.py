"""How the Triton kernels are cut into programs, and in what precision they add up."""

from __future__ import annotations

import torch

from .backend import jit, tl

MOST_RANKS = 64  # wider low-rank factors are taken in steps


@jit
def tile_index(pid, NM, NN):
    """(row tile, column tile) of a program: columns within groups of 8 row tiles, so that neighbours share L2."""
    first = pid // (8 * NN) * 8
    rows = min(NM - first, 8)
    return first + (pid % (8 * NN)) % rows, (pid % (8 * NN)) // rows


@jit
def group_of(block, LEAD: tl.constexpr):
    """The group of a block of columns: LEAD blocks are the first group, each further one a group of its own."""
    return block if LEAD == 1 else tl.maximum(block - (LEAD - 1), 0)


def gemm_tile(dtype: torch.dtype) -> dict[str, int]:
    """Tile and pipeline of a GEMM over operands of `dtype`: 128 bytes of each row per step, at most 96 KB of them."""
    return {"BM": 128, "BN": 128, "BK": 128 // dtype.itemsize, "num_warps": 8, "num_stages": 3}


def check_rows(m: int) -> None:
    """Row numbers are 32-bit; addresses are not."""
    if m > 2**31 - 1024:
        raise ValueError(f"{m} rows in one call are more than the 2**31 - 1024 a kernel can number: split the batch")


def rank_tile(r: int) -> int:
    """The power of two that holds r ranks, from the 16 that a matrix unit takes to MOST_RANKS."""
    return min(MOST_RANKS, max(16, 1 << (r - 1).bit_length()))


def accumulator(dtype: torch.dtype):
    """What products of `dtype` are added up in: fp32, for float64 float64, for int8 int32."""
    if dtype == torch.int8:
        return tl.int32
    return tl.float64 if dtype == torch.float64 else tl.float32


def element_type(dtype: torch.dtype):
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def dot_precision(dtype: torch.dtype = torch.float32) -> str:
    """How a GPU multiplies operands of `dtype`: fp32 as TF32 where the user has allowed it, all else exactly.

    PyTorch has two switches for TF32 and lets the older one be read only until the newer is set, as
    TrainingArguments(tf32=True) does; the newer one knows both.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
