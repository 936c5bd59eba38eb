"""LayerNorm by ATen with fp32 statistics and fp32 sums (fp64 for fp64), whatever rows and parameters come in.

h = (x - mean) / sqrt(var + eps) * weight + bias            x [..., D], mean and 1 / sqrt(var + eps) [...]
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend

layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
CHUNK_ROWS = 256  # rows taken in fp32 at a time: a second-level cache holds them


def norm_aten(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(h, mean, 1 / standard deviation)"""
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
    """Gradients of x, weight and bias, those that `mask` asks for.

    ATen adds up the parameters' gradients in the dtype of the rows; where one is asked for, it gets the rows in fp32.
    """
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
    dh, rows, mean, rstd = dh.reshape(-1, dh.shape[-1]), x.reshape(-1, x.shape[-1]), mean.flatten(), rstd.flatten()
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
