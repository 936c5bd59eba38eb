"""Hugging Face's spellings of activations, and which of them kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from .kernels.activations import gelu


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x)"""
    return F.silu(1.702 * x) / 1.702


# Hugging Face's spellings that keep several tensors for backward, as the same function of one kept tensor; and GELU,
# which is to the last bit what a block computes as one op.
LEAN_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), partial(F.gelu, approximate="tanh")
    ),
    **dict.fromkeys(("gelu", "gelu_python"), gelu),
}


# Hugging Face's spellings of what `kernels.transformer_block` computes; others run apart from it.
FUSED_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
