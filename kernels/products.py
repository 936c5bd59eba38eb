"""Products of matrices in ATen: PyTorch's own, but on CPUs that have a faster way.

    mm, bmm   a b        addmm, baddbmm   beta c + alpha a b        linear   x w^T + bias        through   dy w

Half precision and int8 without instructions for them: PyTorch multiplies one number at a time, 6 to 100 times as long
as fp32 copies of the operands take, which live as long as the product does. Sums are in fp32 either way, and rounded
once.

fp32 without AVX-512: PyTorch asks MKL, and oneDNN takes 0.7 to 0.95 of its time (AMD EPYC, 64 rows and more), where
both operands lie along what is summed up. A weight that a gradient goes through does not: it is turned for as long as
the product takes, which is worth it for many rows, or inside `keep_turned_weights` once. A graph holds PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .targets import multiplied_by_cpu, prefers_onednn

EXACT = 2**10  # products of two int8 numbers, of 2**14 at most, that fp32 adds up without rounding
WORTH = 2**25  # multiplications that take longer than oneDNN's preparation, some 50 us
WIDE = 512  # columns of a weight from which on oneDNN is faster with it turned than MKL with it as it is
MANY = 2048  # rows whose product gains more by that than turning takes
NEAR = 256  # rows of a weight that are turned at a time

_kept: WeakTensorKeyDictionary | None = None  # inside `keep_turned_weights`: of each weight its state, and its w^T


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
    if one_by_one(x):
        return _product(F.linear, x, weight, bias).to(x.dtype)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if recorded or weight.dtype is not x.dtype or not (is_onednns(x, weight.shape[0]) or _adds_bias(x, weight, bias)):
        return F.linear(x, weight, bias)
    return _onednn(x, weight, None if bias is None else bias.contiguous())  # knows no derivative and no strides


def through(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [M, N] w [N, K]: the gradient of the input that `linear` took."""
    if weight.dtype is dy.dtype and weight.shape[1] >= WIDE and is_onednns(dy, weight.shape[1]):
        if _kept is not None and isinstance(weight, torch.nn.Parameter) and not weight.requires_grad:
            return _onednn(dy, _kept_turned(weight, _kept), None)
        if dy.shape[0] >= MANY:
            return _onednn(dy, _turned(weight), None)
    return mm(dy, weight)


@contextmanager
def keep_turned_weights() -> Iterator[None]:
    """Within, a frozen fp32 weight is turned once, on CPUs where that saves time: training takes its bytes once more.

    A step of ModernBERT-base takes 0.95 of its time without AVX-512. Elsewhere, and in other dtypes, nothing is kept.
    Also a decorator; behind the outermost, nothing is left.

    >>> with keep_turned_weights():
    ...     through(torch.ones(1, 2), torch.eye(2))
    tensor([[1., 1.]])
    """
    global _kept
    before, _kept = _kept, WeakTensorKeyDictionary() if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def _kept_turned(weight: Tensor, kept: WeakTensorKeyDictionary) -> Tensor:
    """w^T [K, N] of w [N, K], made anew where the weight has changed.

    Writing to `weight.data` leaves no trace but the numbers: one of each row and of each column is compared.
    """
    state = weight.data_ptr(), None if weight.is_inference() else weight._version
    known, turned = kept.get(weight, (None, None))
    if known != state or not _diagonals_agree(weight, turned):
        turned = _turned(weight.detach())
        kept[weight] = state, turned
    return turned


def _diagonals_agree(weight: Tensor, turned: Tensor) -> bool:
    """Of w [N, K] and w^T [K, N], cut along the longer side into squares."""
    side, longer = min(weight.shape), int(weight.shape[1] > weight.shape[0])
    squares = zip(weight.split(side, longer), turned.split(side, 1 - longer), strict=True)
    return all(torch.equal(a.diagonal(), b.diagonal()) for a, b in squares)


def _turned(weight: Tensor) -> Tensor:
    """w [N, K] -> w^T [K, N], contiguous.

    Some rows at a time, so that a line of memory is still near when its next number is read.
    """
    turned = weight.new_empty(weight.shape[::-1])
    for rows, columns in zip(weight.split(NEAR), turned.split(NEAR, 1), strict=True):
        columns.copy_(rows.t())
    return turned


def is_onednns(x: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies x by so many columns in fp32 faster than what ATen asks. A graph asks for no sizes."""
    if x.dtype is not torch.float32 or not x.is_cpu or torch.compiler.is_compiling():
        return False
    return x.numel() * columns >= WORTH and prefers_onednn()


def _adds_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN, which multiplies bf16, is to add the bias too: ATen writes it to each row first, 2 to 8% more."""
    if x.dtype is not torch.bfloat16 or bias is None or not x.is_cpu or torch.compiler.is_compiling():
        return False
    return weight.numel() > 0 and torch.cpu._is_avx512_bf16_supported()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] b [K, N], both int8 -> [M, N] int32, to the last bit: 15 to 25 times as fast as PyTorch without VNNI."""
    total = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    for i in range(0, a.shape[1], EXACT):
        total += in_fp32(torch.mm, a[:, i : i + EXACT], b[i : i + EXACT]).int()
    return total
