"""Products of matrices in ATen: PyTorch's own, but in fp32 where a CPU has no instructions for half precision or int8.

    mm, bmm   a b        addmm, baddbmm   beta c + alpha a b        linear   x w^T + bias

There PyTorch multiplies bf16 and fp16 one number at a time: 6 to 100 times as long as fp32 copies of the operands take,
which live as long as the product does. Sums are in fp32 either way, and rounded once. A graph holds PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .targets import multiplied_by_cpu

EXACT = 2**10  # products of two int8 numbers, of 2**14 at most, that fp32 adds up without rounding


def one_by_one(t: Tensor) -> bool:
    """Whether PyTorch would multiply matrices of t's dtype one number at a time.

    >>> one_by_one(torch.ones(2))
    False
    """
    dtype = t.dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float16:
        return False
    return t.is_cpu and not torch.compiler.is_compiling() and not multiplied_by_cpu(dtype)


def in_fp32(function: Callable[..., Any], *operands: Tensor | None) -> Any:
    """`function` of fp32 copies, with autocast off: it would make them half precision again."""
    with torch.autocast("cpu", enabled=False):
        return function(*(None if t is None else t.float() for t in operands))


def _product(function: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """`in_fp32` of operands of one dtype: as everywhere else, others are refused."""
    dtypes = {t.dtype for t in operands if t is not None}
    if len(dtypes) > 1:
        raise RuntimeError(f"operands of a product must have one dtype, not {' and '.join(sorted(map(str, dtypes)))}")
    return in_fp32(function, *operands)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N]"""
    return _product(torch.mm, a, b).to(a.dtype) if one_by_one(a) else torch.mm(a, b)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, K] b [B, K, N]"""
    return _product(torch.bmm, a, b).to(a.dtype) if one_by_one(a) else torch.bmm(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor, beta: int = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a b; with beta = 0, only the shape of c counts."""
    if one_by_one(a):
        return _product(partial(torch.addmm, beta=beta, alpha=alpha), c, a, b).to(a.dtype)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def addmm_(c: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """c += alpha a b"""
    return c.add_(_product(torch.mm, a, b), alpha=alpha) if one_by_one(a) else c.addmm_(a, b, alpha=alpha)


def baddbmm(c: Tensor, a: Tensor, b: Tensor, beta: int = 1, alpha: float = 1) -> Tensor:
    """`addmm` of matrices side by side."""
    if one_by_one(a):
        return _product(partial(torch.baddbmm, beta=beta, alpha=alpha), c, a, b).to(a.dtype)
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def baddbmm_(c: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """c += alpha a b, of matrices side by side."""
    return c.add_(_product(torch.bmm, a, b), alpha=alpha) if one_by_one(a) else c.baddbmm_(a, b, alpha=alpha)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] w^T [K, N] + bias, all of one dtype."""
    return _product(F.linear, x, weight, bias).to(x.dtype) if one_by_one(x) else F.linear(x, weight, bias)


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N], both int8 -> [M, N] int32, to the last bit: 15 to 25 times as fast as PyTorch without VNNI."""
    total = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    for i in range(0, a.shape[1], EXACT):
        total += in_fp32(torch.mm, a[:, i : i + EXACT], b[i : i + EXACT]).int()
    return total
