"""Tensor functions that know nothing of models: each in plain PyTorch, in ATen calls and in Triton."""

# `python -m ...` from the repository's root puts this folder on the path under a name that transformers imports. Under
# that name it stays empty: ops that are registered a second time take the first ones' memory with them.
if __name__ != "kernels":
    from .assemble import assemble, assemble_norm_project
    from .attention import attention
    from .attention_half import Attention, Turn
    from .attention_rows import Group, attention_rows
    from .attention_varlen import Ends
    from .backend import get_backend, set_backend
    from .gated import gated
    from .linear_lowrank import linear_lowrank
    from .lora_linear import lora_linear
    from .nf4 import nf4_linear, pack_nf4, unpack_nf4
    from .norm import layer_norm, rms_norm
    from .norm_linear import norm_linear
    from .operands import Half, Linear, Norm
    from .products import keep_turned_weights
    from .quantize import QuantizedRows, dequantize_rows, quantize_rows
    from .rotary import rotary
    from .substitute import substitute
    from .transformer_block import transformer_block

__all__ = [
    "Attention",
    "Ends",
    "Group",
    "Half",
    "Linear",
    "Norm",
    "QuantizedRows",
    "Turn",
    "assemble",
    "assemble_norm_project",
    "attention",
    "attention_rows",
    "dequantize_rows",
    "gated",
    "get_backend",
    "keep_turned_weights",
    "layer_norm",
    "linear_lowrank",
    "lora_linear",
    "nf4_linear",
    "norm_linear",
    "pack_nf4",
    "quantize_rows",
    "rms_norm",
    "rotary",
    "set_backend",
    "substitute",
    "transformer_block",
    "unpack_nf4",
]
