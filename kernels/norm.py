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
    def forward(x, weight, bias, eps, kept_dtype):
        """y [..., D]; mean and 1 / standard deviation, fp32."""
        y, mean, rstd = norm_aten(x, weight, bias, eps)
        return y.to(x.dtype), mean, rstd  # ATen on a GPU computes wide where rows and parameters differ

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, kept_dtype = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x.to(kept_dtype), mean, rstd, weight, bias)

    @staticmethod
    def backward(ctx, dy, _mean, _rstd):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        mask = [need and t is not None for need, t in zip(ctx.needs_input_grad, (x, weight, bias), strict=False)]
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
    compute = backend.in_autocast_dtype(x.new_empty(0)).dtype
    kept = compute if compute.itemsize < x.dtype.itemsize else x.dtype
    return _LayerNorm.apply(x, weight, bias, eps, kept)[0]
