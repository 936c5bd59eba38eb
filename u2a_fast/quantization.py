"""How the frozen linears of an encoder are stored, and what runs on them.

    "int8"        int8 rows and one fp32 scale per row (bitsandbytes' SCB / 127); dequantised per use (W8A16)
    "int8_w8a8"   the same storage; rows of the input are quantised too and multiplied in int8
    "nf4"         bitsandbytes' packed 4-bit NormalFloat: uint8 pairs and one fp32 absmax per block of 64 weights

Only the linears of the blocks are ever quantised: embeddings, norms, biases, adapters, prompts and heads stay as they
are. Which path runs follows from the mode, the device and the shape, never from a timing, so that two runs or two ranks
compute the same. Backward always has dX in the input's dtype, and nothing is kept for a frozen linear but its storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import kernels
from .kernels.linear_backward import linear_backward

if TYPE_CHECKING:
    from .block import Block
    from .encoders import Encoder
    from .lora import LoraLinear

STORAGE = {None: "float", "int8": "int8", "int8_w8a8": "int8", "nf4": "nf4"}  # mode -> how a weight is stored
MODES = tuple(mode for mode in STORAGE if mode)
NF4_BLOCK = 64  # weights that share an absmax


# -------------------------------------------------------------------------------------------------- what the user said
def normalise(quantization: Any, modalities: Iterable[str]) -> dict[str, str | None]:
    """The constructor's `quantization` as `{modality: None or one of MODES}`.

    Args:
        quantization: None, a mode, a `transformers.BitsAndBytesConfig`, or `{modality: any of these}`.
        modalities: every modality of the model; those that a dictionary leaves out are not quantised.

    Raises:
        ValueError: an unknown mode or modality, or a `BitsAndBytesConfig` that asks for something else.
        ImportError: `"nf4"` without bitsandbytes.
        TypeError: anything else was given.

    >>> normalise({"text": "int8"}, ("image", "text"))
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
            _bitsandbytes()
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


# ------------------------------------------------------------------------------------------------------------- storage
def storage_of(weight: Tensor) -> str:
    """`"float"`, `"int8"` or `"nf4"`, by dtype: packed 4-bit weights are uint8."""
    return {torch.int8: "int8", torch.uint8: "nf4"}.get(weight.dtype, "float")


def quantize_encoder(encoder: Encoder, mode: str | None) -> Encoder:
    """Store every frozen linear of every block in `mode`, one at a time and in place; None leaves them as they came.

    Raises:
        ValueError: the encoder is stored in another way already.
    """
    check_storage(encoder, mode)
    for block in encoder.blocks if mode else ():
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
    return pack_nf4(weight) if STORAGE[mode] == "nf4" else kernels.quantize_rows(weight)


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
    for name, parameter in list(block.named_parameters()):
        value = draw(name, parameter)
        if name in weights and mode is not None:
            weights[name].store(*quantize_weight(value, mode))
            weights[name].quantize_input = mode == "int8_w8a8"
        else:
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def stored_elements(name: str, parameter: Tensor) -> int:
    """How many weights a stored tensor stands for: two per byte of packed 4-bit, none for scales."""
    if name.endswith("weight_scale"):
        return 0
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def int8_path() -> str:
    """How int8 products run on this machine, for `u2a-fast doctor`."""
    if torch.cuda.is_available():
        return "int8: weights dequantised per tile; int8_w8a8: int8 tensor cores"
    if torch.cpu._is_vnni_supported():
        return "int8: weights dequantised per use; int8_w8a8: torch._int_mm with VNNI"
    return "int8: weights dequantised per use; int8_w8a8: torch._int_mm without VNNI, slower than floating point"


# ----------------------------------------------------------------------------------------------- 4-bit, by bitsandbytes
def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("nf4 needs bitsandbytes: pip install u2a-fast[bnb]") from error
    return functional


def pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight `[N, K]` -> packed `[ceil(N * K / 2), 1]` uint8 and absmax `[ceil(N * K / 64)]` fp32."""
    functional = _bitsandbytes()
    weight = weight.float() if weight.dtype == torch.float64 else weight
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def unpack_nf4(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The `[N, K]` weight in `dtype`. By bitsandbytes' functions, not its Linear4bit: that one repacks in place."""
    functional = _bitsandbytes()
    computed = torch.float32 if dtype == torch.float64 else dtype
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=functional.get_4bit_type("nf4", device=packed.device),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=computed,
    )
    return functional.dequantize_4bit(packed, state).to(dtype)


class _Nf4Linear(torch.autograd.Function):
    """`lora_linear`, or `linear_lowrank` where s is given, over a 4-bit weight that is unpacked again for backward."""

    @staticmethod
    def forward(ctx, x, s, bias, lora_a, lora_b, packed, absmax, shape, scaling, groups, dropout, seed):
        weight = unpack_nf4(packed, absmax, shape, x.dtype)
        if s is not None:
            y = torch.ops.u2a_fast.linear_lowrank(x, weight, bias, s, lora_b, scaling, None, groups, False, None, None)
        else:
            operands = (lora_a, lora_b, scaling, None, groups, dropout, seed, False)
            y, s = torch.ops.u2a_fast.lora_linear(x, weight, bias, *operands)
        ctx.shape, ctx.scaling, ctx.groups, ctx.dropout = shape, scaling, groups, dropout
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, s, lora_a, lora_b, packed, absmax, seed)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, s, lora_a, lora_b, packed, absmax, seed = ctx.saved_tensors
        need_x, need_s, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        weight = unpack_nf4(packed, absmax, ctx.shape, dy.dtype) if need_x else None
        operands = (dy, x, weight, None, s if need_b else None, lora_a, lora_b)
        options = (ctx.scaling, ctx.groups, ctx.dropout, seed, need_s)
        dx, ds, da, db = linear_backward(*operands, *options)
        grads = [g if need else None for g, need in zip((dx, ds), (need_x, need_s), strict=True)]
        dbias = dy.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if need_bias else None
        return *grads, dbias, da if need_a else None, db if need_b else None, *[None] * 7


def nf4_linear(linear: LoraLinear, x: Tensor, s: Tensor | None, dropout: float) -> Tensor:
    """x `[..., K]` -> `[..., N]` by a linear in 4-bit storage; s `[..., G * r]` where it is computed already."""
    lora_a, lora_b = linear.factors()
    x = kernels.backend.in_autocast_dtype(x)
    s = None if s is None else s.to(x.dtype)
    shape, groups = (linear.out_features, linear.in_features), len(linear.roles)
    seed = None
    if s is None and lora_a is not None and dropout > 0:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    factors = (None if s is not None else lora_a, lora_b)
    storage = (linear.weight, linear.weight_scale, shape)
    return _Nf4Linear.apply(x, s, linear.bias, *factors, *storage, linear.scaling, groups, dropout, seed)
