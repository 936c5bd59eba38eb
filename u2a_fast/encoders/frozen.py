"""What is done to the frozen linears of an encoder: storing them small, and giving them adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import kernels
from ..block import Block
from ..lora_config import LoraConfig
from ..quantization import STORAGE, warn_if_slow
from .base import Encoder


def quantize_encoder(encoder: Encoder, mode: str | None) -> Encoder:
    """Store every frozen linear of every block in `mode`, one at a time and in place; None leaves them as they came.

    Raises:
        ValueError: the encoder is stored in another way already.
    """
    check_storage(encoder, mode)
    warn_if_slow(encoder.dtype, mode)
    if mode is None:
        return encoder
    encoder.quantized_from = encoder.quantized_from or encoder.dtype
    for block in encoder.blocks:
        for linear in block.linears:
            if linear.storage == "float":
                linear.store(*quantize_weight(linear.weight.detach(), mode))
            linear.quantize_input = mode == "int8_w8a8"
    return encoder


def check_storage(encoder: Encoder, mode: str | None) -> None:
    """Refuse to bring an encoder into `mode` whose weights are rounded in another way already."""
    stored = {linear.storage for block in encoder.blocks for linear in block.linears} - {"float"}
    if mode is not None and stored - {STORAGE[mode]}:
        raise ValueError(f"an encoder is stored as {stored.pop()} already: load it in floating point to have {mode}")


def quantize_weight(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """weight `[N, K]` -> int8 `[N, K]` and scale `[N]`; or packed uint8 `[N * K / 2, 1]` and absmax `[N * K / 64]`."""
    return kernels.pack_nf4(weight) if STORAGE[mode] == "nf4" else kernels.quantize_rows(weight)


def mode_of(encoder: Encoder) -> str | None:
    """The mode that an encoder is in, whoever quantised it."""
    linear = encoder.blocks[0].o
    if linear.storage == "int8":
        return "int8_w8a8" if linear.quantize_input else "int8"
    return None if linear.storage == "float" else linear.storage


def materialise_block(block: Block, mode: str | None, draw: Callable[[str, Tensor], Tensor]) -> None:
    """Give a block on the meta device its values, quantising each weight before the next one is drawn.

    Args:
        draw: `(name, meta tensor) -> tensor` of that shape and dtype on the device to run on. `name` is the
            parameter's inside the block, for example `"qkv.weight"`: q, k and v are stacked along the rows.
    """
    weights = {f"{name}.weight": linear for name, linear in block.named_children() if linear in block.linears}
    for name, parameter in list(block.named_parameters()):  # a value has no name here: it would outlive its turn
        if name in weights and mode is not None:
            weights[name].store(*quantize_weight(draw(name, parameter), mode))
            weights[name].quantize_input = mode == "int8_w8a8"
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(draw(name, parameter), requires_grad=False))


def stored_elements(name: str, parameter: Tensor) -> int:
    """How many weights a stored tensor stands for: two per byte of packed 4-bit, none for scales."""
    if name.endswith("weight_scale"):
        return 0
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def add_adapters(encoders: Iterable[Encoder], lora: LoraConfig | None) -> None:
    """Give every block's linears their adapters; None gives none.

    Raises:
        ValueError: a role that none of the encoders has.
    """
    if lora is None:
        return
    linears = [linear for encoder in encoders for block in encoder.blocks for linear in block.linears]
    roles = dict.fromkeys(role for linear in linears for role in linear.roles)
    missing = [role for role in lora.target_modules if role not in {*roles, "fc1"}]  # fc1: of a gated MLP, both parts
    if missing:
        raise ValueError(f"target_modules must name roles of the encoders, {', '.join(roles)}, not {missing[0]}")
    for linear in linears:
        linear.add_adapter(lora)
