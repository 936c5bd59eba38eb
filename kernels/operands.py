"""What a linear with LoRA, a norm and half a transformer block consist of, for ops that take several of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import cast
from .norm_aten import norm_aten, norm_backward_aten


class Linear(NamedTuple):
    """A frozen linear with a low-rank path, as in `linear_lowrank`: `x W^T + b + scaling x A^T B^T`.

    >>> Linear(torch.eye(2)).lora_a is None
    True
    """

    weight: Tensor  # [N, K], floating or int8
    bias: Tensor | None = None  # [N]
    lora_a: Tensor | None = None  # [groups * r, K]
    lora_b: Tensor | None = None  # [N, r]
    weight_scale: Tensor | None = None  # [N] fp32, with int8
    scaling: float = 1.0
    groups: int = 1
    lead: int = 1  # the first group is that many times as wide as each other
    quantize_input: bool = False
    joined: Tensor | None = None  # [N, K + P]: `weight` is a view of it, with room for scaling * B; P >= groups * r


class Norm(NamedTuple):
    """A LayerNorm or, with `rms`, an RMSNorm, which has no bias; without a weight there is none.

    >>> Norm().weight is None, Norm(torch.ones(2), None, 1e-6).eps
    (True, 1e-06)
    """

    weight: Tensor | None = None  # [D]
    bias: Tensor | None = None  # [D]
    eps: float = 1e-5
    rms: bool = False


class Half(NamedTuple):
    """A sublayer and its residual connection: `after(x + scale * second(...first(norm(x))))`. At most one norm.

    >>> half = Half(Norm(torch.ones(2)), Linear(torch.eye(2)), Linear(torch.eye(2)))
    >>> len(half.trained), len(half.frozen)
    (8, 5)
    """

    norm: Norm
    first: Linear
    second: Linear
    scale: Tensor | None = None  # [D]
    after: Norm = Norm()

    @property
    def trained(self) -> tuple[Tensor | None, ...]:
        """What may need a gradient: the norm's weight and bias, then bias, lora_a and lora_b of either linear."""
        norm = self.after if self.norm.weight is None else self.norm
        return *norm[:2], *self.first[1:4], *self.second[1:4]

    @property
    def frozen(self) -> tuple[Tensor | None, ...]:
        """The other tensors."""
        return self.first.weight, self.first.weight_scale, self.second.weight, self.second.weight_scale, self.scale


def add_update(x: Tensor, update: Tensor, scale: Tensor | None, norm: Norm, joined: bool):
    """norm(x + scale * update); where it is normalised also the sum, its mean (None: RMSNorm) and rstd.

    joined: x is part of the update already.
    """
    total = update if joined else x + update if scale is None else torch.addcmul(x, update, scale)
    if norm[0] is None:
        return total, None, None, None
    y, mean, rstd = norm_aten(total, *norm)
    return cast(y, x.dtype), kept_as(total, update.dtype), mean, rstd


def add_update_backward(d_x, total, mean, rstd, scale, norm, dtype, need_weight, need_bias):
    """Gradients of the sum (and so of x), of the update in `dtype`, and of the norm's parameters (None: no norm)."""
    if norm[0] is None:
        return d_x, cast(d_x if scale is None else d_x * scale, dtype), None
    mask = [True, need_weight, need_bias]
    d_x, *d_norm = norm_backward_aten(d_x, cast(total, d_x.dtype), mean, rstd, norm[0], norm[1], mask)
    d_norm = [cast(g, p.dtype) if need else None for g, p, need in zip(d_norm, norm, mask[1:], strict=False)]
    return d_x, cast(d_x if scale is None else d_x * scale, dtype), d_norm


def bias_grad(dy: Tensor, linear: Linear) -> Tensor:
    return dy.sum(0, dtype=linear.bias.dtype)


def kept_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x for backward: under autocast as narrow as what is computed from it."""
    return x if x.dtype.itemsize <= dtype.itemsize else x.to(dtype)
