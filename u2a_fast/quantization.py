"""How the frozen linears of an encoder are stored, and how a user says so.

    "int8"        int8 rows and one fp32 scale per row (bitsandbytes' SCB / 127); dequantised per use (W8A16)
    "int8_w8a8"   the same storage; rows of the input are quantised too and multiplied in int8
    "nf4"         bitsandbytes' packed 4-bit NormalFloat: uint8 pairs and one fp32 absmax per block of 64 weights

Only the linears of the blocks are ever quantised: embeddings, norms, biases, adapters, prompts and heads stay as they
are. Which path runs follows from the mode, the device and the shape, never from a timing, so that two runs or two ranks
compute the same. Backward always has dX in the input's dtype, and nothing is kept for a frozen linear but its storage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .kernels.nf4 import bitsandbytes
from .kernels.targets import has_bfloat16, has_int8

STORAGE = {None: "float", "int8": "int8", "int8_w8a8": "int8", "nf4": "nf4"}  # mode -> how a weight is stored
MODES = tuple(mode for mode in STORAGE if mode)


def storage_of(weight: Tensor) -> str:
    """`"float"`, `"int8"` or `"nf4"`, by dtype: packed 4-bit weights are uint8."""
    return {torch.int8: "int8", torch.uint8: "nf4"}.get(weight.dtype, "float")


def fast_dtype() -> torch.dtype:
    """bfloat16 where it is multiplied in hardware, float32 elsewhere."""
    return torch.bfloat16 if has_bfloat16() else torch.float32


def slower_than_float32(dtype: torch.dtype, mode: str | None = None) -> str | None:
    """Why an encoder of `dtype`, stored in `mode`, would be slower here than in fp32; None where it would not be.

    By what the machine has, never by a timing. Modes that dequantise per use save memory and are not meant here.
    """
    if mode == "int8_w8a8" and not has_int8():
        return "this CPU has no VNNI: products of int8 rows take 1.1 to 2 times as long as in float32"
    if dtype == torch.bfloat16 and not has_bfloat16():
        return "this machine does not multiply bfloat16 in hardware: it takes 1.3 to 10 times as long as float32"
    return None


def warn_if_slow(dtype: torch.dtype, mode: str | None = None) -> None:
    """Say so, once a process: Python's default filter shows a warning of one place and text only once."""
    reason = slower_than_float32(dtype, mode)
    if reason is not None:
        warnings.warn(reason, stacklevel=1)


def read_quantization(quantization: Any, modalities: Iterable[str]) -> dict[str, str | None]:
    """The constructor's `quantization` as `{modality: None or one of MODES}`.

    Args:
        quantization: None, a mode, a `transformers.BitsAndBytesConfig`, or `{modality: any of these}`.
        modalities: every modality of the model; those that a dictionary leaves out are not quantised.

    Raises:
        ValueError: an unknown mode or modality, or a `BitsAndBytesConfig` that asks for something else.
        ImportError: `"nf4"` without bitsandbytes.
        TypeError: anything else was given.

    >>> read_quantization({"text": "int8"}, ("image", "text"))
    {'image': None, 'text': 'int8'}
    """
    names = list(modalities)
    if not isinstance(quantization, Mapping):
        return dict.fromkeys(names, _mode(quantization))
    unknown = [name for name in quantization if name not in names]
    if unknown:
        raise ValueError(f"quantization names {unknown[0]!r}, but the modalities are {', '.join(names)}")
    return {name: _mode(quantization.get(name)) for name in names}


def _mode(given: Any) -> str | None:
    if given is None or (isinstance(given, str) and given in MODES):
        if given == "nf4":
            bitsandbytes()
        return given
    if isinstance(given, str):
        raise ValueError(f"quantization must be one of {', '.join(MODES)} or None, not {given!r}")
    from transformers import BitsAndBytesConfig

    if isinstance(given, BitsAndBytesConfig):
        return _read_bitsandbytes(given)
    raise TypeError(
        "quantization must be a mode, a transformers.BitsAndBytesConfig or a dictionary of these, "
        f"not {type(given).__name__}"
    )


def _read_bitsandbytes(config: Any) -> str | None:
    refused = {
        "llm_int8_has_fp16_weight": config.llm_int8_has_fp16_weight,
        "llm_int8_skip_modules": config.llm_int8_skip_modules,
        "bnb_4bit_use_double_quant": config.load_in_4bit and config.bnb_4bit_use_double_quant,
        f"bnb_4bit_quant_type={config.bnb_4bit_quant_type!r}": config.load_in_4bit
        and config.bnb_4bit_quant_type != "nf4",
    }
    asked = [name for name, value in refused.items() if value]
    if asked:
        raise ValueError(
            f"BitsAndBytesConfig with {asked[0]} is not supported: use load_in_8bit=True, or load_in_4bit=True with "
            'bnb_4bit_quant_type="nf4"'
        )
    return _mode("int8" if config.load_in_8bit else "nf4" if config.load_in_4bit else None)
