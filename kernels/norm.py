"""LayerNorm of the residual stream that keeps one tensor for backward: its input, in the dtype that is computed in.

    y = (x - mean) / sqrt(var + eps) * weight + bias            x [..., D]

Under autocast the residual stream is fp32 and everything computed from it bf16; the kept copy is bf16 too, so that a
post-norm block costs what a bf16 block does. The result, the statistics and all sums stay fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .norm_aten import norm_aten, norm_backward_aten


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, kept_dtype):
        """y [..., D]"""
        y, mean, rstd = norm_aten(x, weight, bias, eps)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if x.dtype == kept_dtype else x.to(kept_dtype), mean, rstd, weight, bias)
        # ATen on a GPU computes wide where rows and parameters differ. Only then: of a `to` that changes nothing
        # torch.compile lost the gradient before torch 2.13.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2] and bias is not None]
        grads = norm_backward_aten(dy, x.to(ctx.dtypes[0]), mean, rstd, weight, bias, mask)
        grads = [g.to(dtype) if need else None for g, dtype, need in zip(grads, ctx.dtypes, mask, strict=True)]
        return *grads, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension, [..., D] in the dtype of x; under autocast backward keeps x in that dtype.

    >>> layer_norm(torch.tensor([1.0, 3.0]), torch.ones(2), None)
    tensor([-1.0000,  1.0000])
    """
    if backend.resolve(x, weight, bias) == "reference":
        wide = [None if t is None else t.to(backend.wide(x.dtype)) for t in (x, weight, bias)]
        return F.layer_norm(wide[0], x.shape[-1:], *wide[1:], eps).to(x.dtype)
    if not backend.needs_grad(x, weight, bias):
        return norm_aten(x, weight, bias, eps)[0].to(x.dtype)
    compute = backend.compute_dtype(x)
    return _LayerNorm.apply(x, weight, bias, eps, compute if compute.itemsize < x.dtype.itemsize else x.dtype)
