"""The dropout mask of the low-rank path: which elements (row, column) of x are kept, a pure function of a 64-bit seed.

    kept(r, c) = mix(key(r, low seed bits) ^ key(c, high seed bits)) >= p          as a fraction of the 32-bit range

Nothing is stored: forward and backward compute the mask where they need it, and every backend computes the same one.
`mix` is the integer hash lowbias32 less its last shift, on int32 that wraps around. What is kept is scaled by
1 / (1 - p) after the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import jit, tl

FIRST, SECOND = 0x7FEB352D, -0x7B935975  # 0x846CA68B as a signed number
CHUNK = 1 << 15  # elements hashed at a time on a CPU: they stay in its cache


def _mix(h: Tensor) -> Tensor:
    h = (h ^ ((h >> 16) & 0xFFFF)) * FIRST
    return (h ^ ((h >> 15) & 0x1FFFF)) * SECOND


def _keys(n: int, half: Tensor) -> Tensor:
    """[n] int32 from half of the seed."""
    index = torch.arange(n, dtype=torch.int32, device=half.device)
    return _mix(_mix(index + 1) + _mix(half.to(torch.int32)))


def threshold(p: float) -> int:
    """A hash below it means dropped."""
    return int(p * 2**32) - 2**31


def kept(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """The mask [rows, columns] bool, on the seed's device."""
    row, column = _keys(rows, seed << 32 >> 32)[:, None], _keys(columns, seed >> 32)
    step = rows if seed.is_cuda else max(1, CHUNK // max(1, columns))
    mask = torch.empty(rows, columns, dtype=torch.bool, device=seed.device)
    for r in range(0, rows, max(1, step)):
        torch.ge(_mix(row[r : r + step] ^ column), threshold(p), out=mask[r : r + step])
    return mask


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x [..., K] with zeros where it is dropped, not yet scaled by 1 / (1 - p)."""
    mask = kept(x.shape[:-1].numel(), x.shape[-1], p, seed)
    return torch.where(mask.view(x.shape), x, 0)


@jit
def mix(h):
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    return (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975


@jit
def kept_tile(SEED, rows, columns, threshold):
    """`kept` at rows [BM] and columns [BN], int32 both."""
    seed = tl.load(SEED)
    row = mix(mix(rows + 1) + mix((seed << 32 >> 32).to(tl.int32)))
    column = mix(mix(columns + 1) + mix((seed >> 32).to(tl.int32)))
    return mix(row[:, None] ^ column[None, :]) >= threshold
