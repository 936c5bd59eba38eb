"""LayerNorm and RMSNorm of the residual stream, which keep one tensor for backward: x, in the dtype of computation.

    y = (x - mean) / sqrt(var + eps) * weight + bias            x [..., D]
    y = x / sqrt(mean(x^2) + eps) * weight

Under autocast the residual stream is fp32 and everything computed from it bf16; the kept copy is bf16 too, so that a
post-norm block costs what a bf16 block does. The result, the statistics and all sums stay fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .norm_aten import norm_aten, norm_backward_aten, norm_reference


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms, kept_dtype):
        """y [..., D]"""
        y, mean, rstd = norm_aten(x, weight, bias, eps, rms)
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
        return *grads, None, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension, [..., D] in the dtype of x; under autocast backward keeps x in that dtype.

    Raises:
        TypeError, ValueError: x is not floating, or weight or bias is not [D].

    >>> layer_norm(torch.tensor([1.0, 3.0]), torch.ones(2), None)
    tensor([-1.0000,  1.0000])
    """
    return _norm(x, weight, bias, eps, False)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, [..., D] in the dtype of x; under autocast backward keeps x in that dtype.

    Statistics and the product with the weight are fp32 (fp64 for fp64); Hugging Face rounds to the dtype of x before
    that product.

    Raises:
        TypeError, ValueError: x is not floating, or weight is not [D].

    >>> rms_norm(torch.tensor([1.0, 7.0]), torch.ones(2), 0.0)
    tensor([0.2000, 1.4000])
    """
    return _norm(x, weight, None, eps, True)


def _norm(x, weight, bias, eps, rms):
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.dim() != 1 or vector.shape != x.shape[-1:]):
            raise ValueError(f"{name} must be {list(x.shape[-1:])} like the rows of x, not {list(vector.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, not {x.dtype}: convert it first")
    if backend.resolve(x, weight, bias) == "reference":
        return norm_reference(x, weight, bias, eps, rms).to(x.dtype)
    if not backend.needs_grad(x, weight, bias):
        return norm_aten(x, weight, bias, eps, rms)[0].to(x.dtype)
    compute = backend.compute_dtype(x)
    return _Norm.apply(x, weight, bias, eps, rms, compute if compute.itemsize < x.dtype.itemsize else x.dtype)
