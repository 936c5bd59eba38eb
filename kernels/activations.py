"""Activations and their derivatives by name, in ATen calls and in Triton.

    gelu         u (1 + erf(u / sqrt(2))) / 2
    gelu_tanh    u sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3))
    quick_gelu   u sigmoid(1.702 u)
    relu         max(u, 0)
    silu         u sigmoid(u)

As Hugging Face's: `gelu_tanh` is also written with tanh, `quick_gelu` is CLIP's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import jit, tl

gelu_backward = torch.ops.aten.gelu_backward.default
silu_backward = torch.ops.aten.silu_backward.default
threshold_backward = torch.ops.aten.threshold_backward.default

SMALL = 2**13  # numbers up to which a CPU computes GELU sooner than oneDNN, which takes all but views, has prepared it


def _small(u: Tensor) -> Tensor | None:
    """The transposed rows of a small u; None of a large one."""
    if not u.is_cpu or torch.compiler.is_compiling() or u.dim() < 2 or u.numel() > SMALL:
        return None
    return (u if u.dim() == 2 else u.flatten(0, -2)).t()


def gelu(u: Tensor) -> Tensor:
    """u (1 + erf(u / sqrt(2))) / 2, to the last bit the same for rows in any shape."""
    small = _small(u)
    return F.gelu(u) if small is None else F.gelu(small).t().reshape(u.shape)


def _gelu_backward(d: Tensor, u: Tensor) -> Tensor:
    small = _small(u)
    return gelu_backward(d, u) if small is None else gelu_backward(d.t(), small).t()


# name: (act(u), the gradient of u from that of act(u))
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (gelu, _gelu_backward),
    "gelu_tanh": (
        lambda u: F.gelu(u, approximate="tanh"),
        lambda d, u: gelu_backward(d, u, approximate="tanh"),
    ),
    "quick_gelu": (lambda u: F.silu(1.702 * u) / 1.702, lambda d, u: silu_backward(d, 1.702 * u)),
    "relu": (F.relu, lambda d, u: threshold_backward(d, u, 0)),
    "silu": (F.silu, silu_backward),
}


@jit
def activate(u, NAME: tl.constexpr):
    """act(u) and its derivative at u, in the dtype of u; what is not used costs nothing."""
    if NAME == "relu":
        return tl.where(u < 0, 0.0, u), tl.where(u > 0, 1.0, 0.0).to(u.dtype)  # NaN stays what it is
    if NAME == "gelu":
        share = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        return u * share, share + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    inner = 1.702 * u if NAME == "quick_gelu" else u
    steep = inner  # u times the derivative of inner
    if NAME == "gelu_tanh":
        inner = 1.5957691216057308 * u * (1 + 0.044715 * u * u)
        steep = 1.5957691216057308 * u * (1 + 0.134145 * u * u)
    share = 1 / (1 + tl.exp(-inner))
    return u * share, share + steep * share * (1 - share)
