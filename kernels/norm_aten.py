"""LayerNorm and RMSNorm by ATen with fp32 statistics and sums (fp64 for fp64), whatever rows and parameters come in.

h = (x - mean) / sqrt(var + eps) * weight + bias            x [..., D], mean and rstd = 1 / sqrt(var + eps) [...]
h = x / sqrt(mean(x^2) + eps) * weight                      RMSNorm: no mean, rstd = 1 / sqrt(mean(x^2) + eps)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .backend import cast
from .chunks import flat, row_chunks_by_core

layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
CHUNK_ROWS = 256  # rows taken in fp32 at a time: a second-level cache holds them


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """h in fp32 at least, by plain PyTorch."""
    x, weight, bias = (None if t is None else t.to(backend.wide(x.dtype)) for t in (x, weight, bias))
    if rms:
        refuse_bias(bias)
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def refuse_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise ValueError(f"RMSNorm has no bias, but one of {list(bias.shape)} was given: leave it out")


def norm_aten(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(h, mean, rstd); with `rms` no mean."""
    if rms:
        refuse_bias(bias)
        h, rstd = _rms_norm(x, weight, eps)
        return h, None, rstd
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    dtype, own = _dtypes(x, weight, bias)
    bias = None if bias is None else bias.to(own)
    return torch.native_layer_norm(x.to(dtype), weight.shape, weight.to(own), bias, eps)


def _dtypes(x: Tensor, *parameters: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """What ATen takes rows and parameters in, so that statistics are fp32 and no parameter is rounded.

    On a CPU the statistics carry the parameters' dtype; on a GPU they are fp32, but rows and parameters must agree.
    """
    wide = backend.wide(x.dtype)
    if not x.is_cuda:
        return x.dtype, wide
    same = all(p is None or p.dtype == x.dtype for p in parameters)
    return (x.dtype, x.dtype) if same else (wide, wide)


def norm_backward_aten(dh, x, mean, rstd, weight, bias, mask):
    """Gradients of x, weight and bias, those that `mask` asks for; without a mean, RMSNorm's.

    ATen adds up the parameters' gradients in the dtype of the rows; where one is asked for, it gets the rows in fp32.
    """
    if mean is None:
        return *_rms_backward(dh, x, rstd, weight, mask[:2]), None
    if dh.dtype == x.dtype == weight.dtype and x.dtype.itemsize >= 4:
        return _backward(dh, x, mean, rstd, weight, mask)
    dtype, own = _dtypes(x, weight, bias)
    wide = backend.wide(x.dtype)
    if dtype != wide and (mask[1] or mask[2]):
        return _backward_in_chunks(dh, x, mean, rstd, weight.to(wide), mask)
    return _backward(dh.to(dtype), x.to(dtype), mean, rstd, weight.to(own), mask)


def _backward(dh, x, mean, rstd, weight, mask):
    if mean.dim() != x.dim():
        mean, rstd = (t.view(*x.shape[:-1], 1) for t in (mean, rstd))
    # the second weight stands for the bias, of which only the shape matters
    return layer_norm_backward(dh, x, weight.shape, mean, rstd, weight, weight, mask)


def _backward_in_chunks(dh, x, mean, rstd, weight, mask):
    dh, rows, mean, rstd = flat(dh), flat(x), mean.flatten(), rstd.flatten()
    dx = torch.empty_like(rows) if mask[0] else None
    sums = [torch.zeros_like(weight) if wanted else None for wanted in mask[1:]]
    size = CHUNK_ROWS if x.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), size):
        s = slice(start, start + size)
        part = _backward(dh[s].to(weight.dtype), rows[s].to(weight.dtype), mean[s], rstd[s], weight, mask)
        if mask[0]:
            dx[s] = part[0]
        for total, term in zip(sums, part[1:], strict=True):
            if total is not None:
                total.add_(term)
    return None if dx is None else dx.view(x.shape), *sums


# ------------------------------------------------------------------------------------------------------------- RMSNorm
def _rms_norm(x, weight, eps):
    """(h, rstd). ATen has one pass for it on a GPU; on a CPU it has several over all of memory."""
    if x.is_cuda:
        dtype, own = _dtypes(x, weight)
        return torch.ops.aten._fused_rms_norm(x.to(dtype), weight.shape, weight.to(own), eps)
    rows, weight = flat(x), cast(weight, backend.wide(x.dtype))
    h, rstd = rows.new_empty(rows.shape), rows.new_empty(rows.shape[0], 1, dtype=weight.dtype)
    for s in row_chunks_by_core(rows):
        part = cast(rows[s], weight.dtype)
        norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        rstd[s] = norm.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        h[s] = (part * norm).mul_(weight)
    return h.view(x.shape), rstd.view(*x.shape[:-1], 1)


def _rms_backward(dh, x, rstd, weight, mask):
    """Gradients of x and weight: dx = rstd (g - x rstd^2 mean(g x)) with g = dh * weight."""
    wide = backend.wide(x.dtype)
    if x.is_cuda:
        dtype, own = (wide, wide) if mask[1] else _dtypes(x, weight)
        operands = dh.to(dtype), x.to(dtype), weight.shape, rstd.view(*x.shape[:-1], 1), weight.to(own), mask
        return torch.ops.aten._fused_rms_norm_backward(*operands)
    rows, dh, rstd, weight = flat(x), flat(dh), rstd.view(-1, 1), cast(weight, wide)
    dx = rows.new_empty(rows.shape) if mask[0] else None
    d_weight = torch.zeros_like(weight) if mask[1] else None
    for s in row_chunks_by_core(rows):
        part, g, r = cast(rows[s], wide), cast(dh[s], wide), rstd[s]
        if mask[1]:
            d_weight.add_((part * g).mul_(r).sum(0))
        if mask[0]:
            g = g * weight
            along = torch.linalg.vecdot(g, part)[:, None] * r.square() / -rows.shape[1]
            dx[s] = g.addcmul_(part, along).mul_(r)
    return None if dx is None else dx.view(x.shape), d_weight
