"""Tiny random encoders of every supported family, their inputs, and what Hugging Face itself says about them.

Every parameter is drawn at random (LayerNorm weights around 1, LayerScale and every bias included), so that no scale,
shift or class token hides behind a one or a zero.
"""

from contextlib import ExitStack
from functools import wraps
from unittest import mock

import torch
from tiny_configs import CONFIGS, END_OF_TEXT, SPEECHES, SPELLING, TEXTS, WIDTH
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

TEXT_LENGTH, SAMPLES = 7, 200

FAMILIES = list(CONFIGS)
TEXT_FAMILIES = list(TEXTS)
SPEECH_FAMILIES = list(SPEECHES)
PADDED_FAMILIES = [*TEXT_FAMILIES, *SPEECH_FAMILIES, "siglip2_vision"]


def build(name: str, seed: int = 0, **config_overrides) -> nn.Module:
    """A random Hugging Face encoder in eval mode; `hidden_size=48`, `num_hidden_layers=3` and so on work for all."""
    model_class, config_class, settings = CONFIGS[name]
    spelling = SPELLING.get(name, {})
    settings = {spelling.get(key, key): value for key, value in (settings | config_overrides).items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**settings))
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=max(1, parameter[0].numel()) ** -0.5)
        else:
            is_scale = name.endswith("weight") or "lambda" in name
            is_scale &= type(model.get_submodule(name.rpartition(".")[0])).__name__ != "Gemma3RMSNorm"  # 1 + weight
            parameter.normal_(mean=1.0 if is_scale else 0.0, std=0.2)


def inputs(name: str, batch: int, seed: int = 0, padded: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    """Keyword arguments of the model's forward. `padded`: right padding where the family knows padding."""
    generator = torch.Generator().manual_seed(seed)
    if name in TEXT_FAMILIES:
        return _text_inputs(name, batch, padded, generator)
    if name in SPEECH_FAMILIES:
        return _speech_inputs(batch, padded, generator, dtype)
    if name == "siglip2_vision":
        return _patch_rows(batch, padded, generator, dtype)
    key, shape = {
        "ast": ("input_values", (56, 24)),
        "whisper": ("input_features", (12, 18)),
        "videomae": ("pixel_values", (4, 3, 24, 24)),
    }.get(name, ("pixel_values", (3, 24, 24)))
    return {key: torch.randn(batch, *shape, generator=generator).to(dtype)}


def _lengths(batch: int, longest: int, shortest: int, generator: torch.Generator) -> Tensor:
    """[batch] random lengths, the first one the longest."""
    lengths = torch.randint(shortest, longest, (batch,), generator=generator)
    lengths[:1] = longest
    return lengths


def _text_inputs(name: str, batch: int, padded: bool, generator: torch.Generator) -> dict:
    pad = CONFIGS[name][2].get("pad_token_id", 0)
    ids = torch.randint(3, END_OF_TEXT, (batch, TEXT_LENGTH), generator=generator)
    lengths = _lengths(batch, TEXT_LENGTH, 2, generator) if padded else torch.full((batch,), TEXT_LENGTH)
    positions = torch.arange(TEXT_LENGTH)
    ids[positions == lengths[:, None] - 1] = END_OF_TEXT
    real = positions < lengths[:, None]
    return {"input_ids": ids.masked_fill(~real, pad), "attention_mask": real.long()}


def _speech_inputs(batch: int, padded: bool, generator: torch.Generator, dtype: torch.dtype) -> dict:
    values = torch.randn(batch, SAMPLES, generator=generator).to(dtype)
    if not padded:
        return {"input_values": values}
    real = torch.arange(SAMPLES) < _lengths(batch, SAMPLES, 60, generator)[:, None]
    return {"input_values": values * real, "attention_mask": real.long()}


def _patch_rows(batch: int, padded: bool, generator: torch.Generator, dtype: torch.dtype) -> dict:
    """Patches of pictures of 3 x 3; `padded`: of several shapes, so that the smaller are filled up."""
    sides = torch.randint(1, 4, (batch, 2), generator=generator) if padded else torch.full((batch, 2), 3)
    sides[:1] = 3
    return {
        "pixel_values": torch.randn(batch, 9, 48, generator=generator).to(dtype),
        "spatial_shapes": sides,
        "pixel_attention_mask": (torch.arange(9) < sides.prod(dim=1)[:, None]).long(),
    }


class _InDoubles(TorchFunctionMode):
    """What a layer in fp64 would round to fp32 for a while (RMSNorm, ModernBERT's and ESM's angles) stays as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        narrows = function is Tensor.float or (function is Tensor.to and torch.float32 in args)
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


def _in_doubles(forward):
    @wraps(forward)
    def call(*args, **kwargs):
        with _InDoubles():
            return forward(*args, **kwargs)

    return call


def hidden_states(model: nn.Module, name: str, **inputs) -> Tensor:
    """[B, S, D] by Hugging Face's own forward, its layers and norms in the dtype of the model throughout."""
    if name == "vit_mae":  # in order, none of them masked
        pixels = inputs["pixel_values"]
        patches = torch.arange(pixels[0, 0].numel() / 8**2, device=pixels.device)
        inputs["noise"] = patches.expand(len(pixels), -1)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) or type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(mock.patch.object(module, "forward", _in_doubles(module.forward)))
        return model(**inputs).last_hidden_state


def token_mask(model: nn.Module, name: str, **inputs) -> Tensor | None:
    """[B, S] bool, True = a real row of the hidden states; None: every row is real."""
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    if mask is None or name not in SPEECH_FAMILIES:
        return None if mask is None else mask.bool()
    length = int(model._get_feat_extract_output_lengths(mask.shape[1]))
    return model._get_feature_vector_attention_mask(length, mask)


def build_many(names: dict[str, str], seed: int = 0, widths: dict[str, int] | None = None, **overrides) -> dict:
    """{modality: encoder} of {modality: family}; `widths` makes some modalities wider or narrower than the others."""
    widths = widths or {}
    return {
        modality: build(name, seed + index, **{"hidden_size": widths.get(modality, WIDTH)} | overrides)
        for index, (modality, name) in enumerate(names.items())
    }


def inputs_many(
    names: dict[str, str], batch: int, seed: int = 0, padded: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, dict]:
    """{modality: keyword arguments} for the encoders of `build_many`."""
    return {m: inputs(name, batch, seed + index, padded, dtype) for index, (m, name) in enumerate(names.items())}
