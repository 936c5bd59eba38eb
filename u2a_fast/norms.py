"""The norms of a block as modules, and what kernels take of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

from . import kernels


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * factor * (offset + weight) over the last dimension (arXiv 1910.07467).

    Args:
        weight: `[D]`.
        eps: added to the mean of squares.
        offset: 1 for Gemma, whose weights are differences from one.
        factor: of the softmax's scale, where it is taken into the norm of queries.

    >>> RMSNorm(torch.zeros(2), eps=0.0, offset=1.0)(torch.tensor([[1.0, 7.0]]))
    tensor([[0.2000, 1.4000]])
    """

    bias = None

    def __init__(self, weight: torch.Tensor, eps: float, offset: float = 0.0, factor: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.eps, self.offset, self.factor = eps, offset, factor

    @property
    def scale(self) -> torch.Tensor:
        """`factor * (offset + weight)` `[D]`; in fp32 at least where it is not the weight, which it would round."""
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight  # parametrised
        if not self.offset and self.factor == 1:
            return weight
        scale = self.offset + weight.to(torch.promote_types(weight.dtype, torch.float32))
        return scale if self.factor == 1 else self.factor * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalise(self, x)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"


BlockNorm: TypeAlias = nn.LayerNorm | RMSNorm


def operands(norm: BlockNorm | None) -> kernels.Norm:
    """What kernels take of a norm; None: there is none."""
    if norm is None:
        return kernels.Norm()
    if isinstance(norm, RMSNorm):
        return kernels.Norm(norm.scale, None, norm.eps, rms=True)
    own = vars(norm)  # attributes of a module are slow to read
    if own["_modules"]:  # parametrised
        return kernels.Norm(norm.weight, norm.bias, norm.eps)
    weight_bias = own["_parameters"]
    return kernels.Norm(weight_bias["weight"], weight_bias["bias"], own["eps"])


def normalise(norm: BlockNorm | None, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` in the dtype of x; of all that it needs for backward, x alone is kept."""
    if isinstance(norm, RMSNorm):
        return kernels.rms_norm(x, norm.scale, norm.eps)
    return x if norm is None else kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)


def normalise_heads(rows: torch.Tensor, norms: Sequence[RMSNorm]) -> torch.Tensor:
    """rows `[..., C]`, whose first heads are normalised, each by its own norm: gradients reach the norms."""
    width = norms[0].weight.shape[0]
    heads = rows[..., : len(norms) * width].unflatten(-1, (len(norms), width)).unbind(-2)
    rest = rows[..., len(norms) * width :]
    return torch.cat([*(norm(head) for norm, head in zip(norms, heads, strict=True)), rest], dim=-1)
