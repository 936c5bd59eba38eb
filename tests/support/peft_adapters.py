"""Encoders with adapters of PEFT, and of ours, with values at random."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import tiny_encoders
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from u2a_fast import LoraConfig
from u2a_fast.encoders import Encoder, from_pretrained_model
from u2a_fast.encoders.build import family_of
from u2a_fast.encoders.frozen import add_adapters
from u2a_fast.lora_config import GATED
from u2a_fast.peft_folders import WEIGHTS


def adapted(model: nn.Module, **options) -> nn.Module:
    """A copy of a Hugging Face model under PEFT's LoRA, B not zero."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **options))
    return wrapped.to(model.dtype).eval()


def targets(model: nn.Module, *roles: str) -> str:
    """A regular expression for the linears of some roles in a model's layers; fc1 of a gated MLP: gate and up."""
    family, wanted = family_of(model), {*roles, *(GATED if "fc1" in roles else ())}
    paths = "|".join(path for path, played in family.linears.items() if wanted & {*played}).replace(".", r"\.")
    layers = family.layers.replace(".", r"\.")
    return rf"{layers}\.\d+\.({paths})"


def ours(model: nn.Module, **options) -> Encoder:
    """An encoder of ours with random adapters, in the model's dtype."""
    encoder = from_pretrained_model(model)
    add_adapters([encoder], LoraConfig(**options))
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.to(model.dtype)


def real_rows(model: nn.Module, name: str, hidden: Tensor, **inputs) -> Tensor:
    """Hidden states `[B, S, D]` without the rows of padding: `[R, D]`."""
    mask = tiny_encoders.token_mask(model, name, **inputs)
    return hidden.flatten(0, 1) if mask is None else hidden[mask]


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Change the keys of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
