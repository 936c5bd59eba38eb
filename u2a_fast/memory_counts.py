"""Counting bytes: of what autograd keeps, and of encoders that need not exist, on tensors that have shapes only."""

from __future__ import annotations

import copy
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .encoders import Encoder, from_pretrained_model
from .encoders.base import FUSED
from .encoders.build import TOWERS, family_of
from .kernels.nf4 import NF4_BLOCK
from .lora import LoraLinear
from .lora_config import LoraConfig
from .methods import U2A
from .quantization import STORAGE

TEXT_TOKENS = 128  # length of a text where none is given
DEPTHS = (2, 3)  # layers that are counted; what a further layer adds is the difference


# ------------------------------------------------------------------------------------------- what autograd keeps
class _Kept:
    """A saved tensor, alive for as long as the graph is."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_bytes(f: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward when `f` returns, each storage counted once.

    Args:
        f: runs a forward; what it returns is held until the count is taken, so that its graph is alive.
        exclude: tensors that exist anyway, as a model's parameters do.

    >>> x = torch.ones(4, requires_grad=True)
    >>> saved_bytes(lambda: x.exp())
    16
    """
    kept: list[weakref.ref[_Kept]] = []

    def pack(tensor: Tensor) -> _Kept:
        kept.append(weakref.ref(holder := _Kept(tensor.detach())))  # an output would keep its own graph alive
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = f()
    own = {tensor.untyped_storage()._cdata for tensor in exclude}
    alive = [holder.tensor.untyped_storage() for ref in kept if (holder := ref()) is not None]
    del result
    return sum({s._cdata: s.nbytes() for s in alive if s._cdata not in own}.values())


# ---------------------------------------------------------------------------------------- encoders that do not exist
@contextmanager
def _fake() -> Iterator[None]:
    """Tensors made inside have shapes, dtypes and a device, but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch reads `.grad` of parameters that it copies
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def read_config(source: str | os.PathLike | PreTrainedConfig, modality: str) -> PreTrainedConfig:
    """The config of an encoder, without dropout, of which one tower is taken where there are two."""
    config = (
        source if isinstance(source, PreTrainedConfig) else AutoConfig.from_pretrained(source, trust_remote_code=False)
    )
    if (config.model_type, modality) in TOWERS:
        config = config.text_config if modality == "text" else config.vision_config
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.0)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    return config


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    return config


def _build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The encoder of a config, on fake tensors; call it inside `_fake()`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    tower = type(config).__name__.replace("Config", "Model")
    with unset_fake_temporarily(), torch.device("meta"):  # Data2Vec and VideoMAE compute numbers of their own there
        if config.model_type == "whisper":
            from transformers.models.whisper.modeling_whisper import WhisperEncoder

            model = WhisperEncoder(config)
        elif tower in TOWERS.values():  # not all of which an automatic class knows
            model = getattr(transformers, tower)(config)
        else:
            model = AutoModel.from_config(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        plain = [(name, value) for name, value in vars(module).items() if torch.is_tensor(value)]  # as in VideoMAE
        for name, tensor in [*module.named_buffers(recurse=False), *plain]:
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype))
    if (embeddings := getattr(model, "embeddings", None)) and hasattr(embeddings, "resize_positional_embeddings"):
        embeddings.resize_positional_embeddings = partial(_of_squares, embeddings.resize_positional_embeddings)
    model.train()
    # Layers are dropped there: at a rate of 0, but transformers 5.17 compares all the same, and fakes have no values.
    model.get_submodule(family_of(model).layers.rpartition(".")[0]).training = False
    return model


def _of_squares(resize: Callable, positions: Tensor, spatial_shapes: Tensor, max_length: int) -> Tensor:
    """SigLIP 2's positions of pictures that are square, since fakes have no sides to read."""
    return resize(positions, np.full(spatial_shapes.shape, math.isqrt(max_length)), max_length)


def with_tokens(config: PreTrainedConfig, tokens: int | None) -> PreTrainedConfig:
    """A config whose images or videos give `tokens` rows, the class token included; other configs as they are."""
    if tokens is None or not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        return config
    config = copy.deepcopy(config)
    rows = tokens - 1
    if hasattr(config, "num_frames"):  # a video, without a class token
        rows = tokens / (config.num_frames // config.tubelet_size)
    config.image_size = config.patch_size * max(1, round(rows**0.5))
    return config


def dummy_inputs(config: PreTrainedConfig, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
    """Inputs of the shapes that an encoder takes, `tokens` rows long where their length is free."""
    if hasattr(config, "conv_stride"):  # Wav2Vec2, HuBERT: samples
        stride = 1
        for step in config.conv_stride:
            stride *= step
        return {"input_values": torch.zeros(batch, stride * ((tokens or 49) + 1))}
    if config.model_type == "whisper":
        return {"input_features": torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions)}
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):  # AST
        return {"input_values": torch.zeros(batch, config.max_length, config.num_mel_bins)}
    if hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        return {"pixel_values": torch.zeros(batch, *frames, config.num_channels, height, width)}
    if hasattr(config, "num_patches"):  # SigLIP 2: the patches of pictures of any shape
        side = math.isqrt(tokens or config.num_patches)
        patches = torch.zeros(batch, side**2, config.num_channels * config.patch_size**2)
        return {"pixel_values": patches, "spatial_shapes": torch.full((batch, 2), side)}
    length = min(tokens or TEXT_TOKENS, config.max_position_embeddings - 2)  # RoBERTa starts its positions at 2
    return {"input_ids": torch.full((batch, length), min(5, config.vocab_size - 1))}


# ------------------------------------------------------------------------------------------------ the ways to train
@dataclass(frozen=True)
class Case:
    """What all ways of training have in common."""

    configs: dict[str, PreTrainedConfig]
    batch: int
    tokens: dict[str, int]
    checkpointing: bool
    lora: LoraConfig | None
    modes: dict[str, str | None]
    dtype: torch.dtype


Counts = tuple[int, ...]  # bytes of weights, trained parameters, bytes of activations


def extrapolate(count: Callable[[dict[str, int]], Counts], depths: Mapping[str, int]) -> Counts:
    """`count(layers per modality)` at full depth, from counts at few layers: each further layer adds the same."""
    low, high = DEPTHS
    base = {name: min(depth, high) if depth <= high else low for name, depth in depths.items()}
    total = start = count(base)
    for name, depth in depths.items():
        if depth > high:
            more = count({**base, name: high})
            total = tuple(t + (depth - low) * (m - s) for t, m, s in zip(total, more, start, strict=True))
    return total


def _enable_checkpointing(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def count_ours(case: Case, layers: Mapping[str, int]) -> Counts:
    with _fake():
        built = {}
        for name, config in case.configs.items():
            built[name] = from_pretrained_model(_build(_cut(config, layers[name]), case.dtype))
        weights = sum(_frozen_bytes(encoder, case.modes[name]) for name, encoder in built.items())
        model = U2A(built, num_labels=2, lora=case.lora, all_absent="prior", modality_dropout=0.0).train()
        if case.checkpointing:
            _enable_checkpointing(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

        def step() -> Tensor:
            read = [_read(model, case, name) for name in case.configs]
            return torch.stack([rows.sum() for rows in read]).sum()

        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.float32):
            kept = saved_bytes(step, model.parameters())
    return weights + 4 * trained, trained, kept


def _read(model: U2A, case: Case, name: str) -> Tensor:
    """Class token and proxies of one modality, `[M, B, D]`, all samples present."""
    tokens, _ = model.encoders[name].embed(**dummy_inputs(case.configs[name], case.batch, case.tokens.get(name)))
    class_token, proxies = model.read(name, tokens, None)
    return torch.cat([class_token[None], proxies])


def _frozen_bytes(encoder: Encoder, mode: str | None) -> int:
    """Bytes of an encoder whose linears are stored in `mode`, whatever they are stored in now."""
    linears = [linear for block in encoder.blocks for linear in block.linears]
    counted = {id(linear.weight) for linear in linears}
    others = sum(t.numel() * t.itemsize for t in tensors_of(encoder) if id(t) not in counted)
    return others + sum(_weight_bytes(linear, STORAGE[mode]) for linear in linears)


def _weight_bytes(linear: LoraLinear, storage: str) -> int:
    count = linear.out_features * linear.in_features
    if storage == "int8":
        return count + 4 * linear.out_features
    if storage == "nf4":
        return -(-count // 2) + 4 * -(-count // NF4_BLOCK)
    return count * linear.weight.itemsize


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def count_hugging_face(case: Case, name: str, layers: int, adapt: bool) -> Counts:
    """Full fp32 fine-tuning of one encoder, or LoRA as PEFT computes it under bf16 autocast."""
    with _fake():
        model = _build(_cut(case.configs[name], layers))
        frozen = sum(t.numel() * t.itemsize for t in tensors_of(model))
        if adapt:
            model.requires_grad_(False)
            _adapt(model, case.lora or LoraConfig())
        if case.checkpointing:
            _enable_checkpointing(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        inputs = dummy_inputs(case.configs[name], case.batch, case.tokens.get(name))
        if "spatial_shapes" in inputs:
            inputs["pixel_attention_mask"] = None
        with torch.autocast("cpu", torch.bfloat16, enabled=adapt):
            kept = saved_bytes(lambda: model(**inputs).last_hidden_state[:, 0].sum(), model.parameters())
    return frozen + (4 * trained if adapt else 0), trained, kept


class _PeftLinear(nn.Module):
    """A frozen linear with LoRA as PEFT computes it, `base(x) + B(A(x)) * scaling`, each its own linear."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        super().__init__()
        self.base, self.scaling = base, config.scaling
        self.lora_a = nn.Linear(base.in_features, config.r, bias=False)
        self.lora_b = nn.Linear(config.r, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x.to(self.lora_a.weight.dtype))) * self.scaling


def _adapt(model: PreTrainedModel, config: LoraConfig) -> None:
    family = family_of(model)
    for layer in model.get_submodule(family.layers):
        for role in family.roles:
            if not any(map(config.adapts, FUSED.get(role, (role,)))):
                continue
            parent, _, leaf = family.path(role).rpartition(".")
            owner = layer.get_submodule(parent)
            setattr(owner, leaf, _PeftLinear(getattr(owner, leaf), config))
