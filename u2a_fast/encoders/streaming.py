"""A checkpoint as an `Encoder`, quantised block by block: beside what is stored, one layer is in memory at a time.

transformers' own loader builds the model and reads all of it but the layers, which stay on the meta device. What a
block is made of is then read linear by linear, from wherever transformers would find it, and quantised at once.
Checkpoints that this does not fit (other files than safetensors, tensors that transformers converts, values that are
missing) are loaded as a whole first; the encoder is the same, bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file

from ..block import Block
from ..lora import LoraLinear
from .base import Encoder, Family
from .build import class_for, explained, family_of, from_pretrained_model, load
from .frozen import materialise_block, quantize_encoder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Whole(Exception):
    """A checkpoint that has to be loaded as a whole."""


class Place(NamedTuple):
    """Where a tensor lies."""

    file: str
    key: str


def load_encoder(name_or_path: str, modality: str, mode: str | None = None, **options: Any) -> Encoder:
    """The encoder of `modality` from a hub id or a folder, its linears stored in `mode`.

    Args:
        mode: of `quantization.MODES`; None: as they came.
        options: of transformers' `from_pretrained`, for example `dtype`.

    Raises:
        ValueError: nothing can be loaded from there, or it is not supported: see `load` and `from_pretrained_model`.

    >>> import tempfile
    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)
    ...     load_encoder(folder, "text", "int8").blocks[0].qkv
    LoraLinear(8 -> q+k+v 24, int8)
    """
    encoder = None
    if mode is not None and "quantization_config" not in options:
        encoder = _streamed(name_or_path, modality, mode, **options)
    if encoder is None:
        encoder = from_pretrained_model(load(name_or_path, modality, **options))
    return quantize_encoder(encoder, mode)


def checkpoint_files(source: str | os.PathLike) -> list[str]:
    """The safetensors files under `source`, a folder or hub id, on this machine.

    Raises:
        OSError: there are none.
        ValueError: the index names one that is not beside it.
    """
    file = cached_file(source, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if file is not None:
        return [file]
    index = Path(cached_file(source, INDEX))
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"it names the file {name[:200]!r}, which is none beside it")
    return [cached_file(source, name) for name in names]


def _streamed(name_or_path: str, modality: str, mode: str, **options: Any) -> Encoder | None:
    """As `load_encoder`; None where the checkpoint has to be loaded as a whole."""
    with explained(name_or_path, modality):
        try:
            model, layers = _without_layers(name_or_path, modality, **options)
            places = _places(model, layers, checkpoint_files(name_or_path))
        except _Whole:
            return None
    encoder = from_pretrained_model(model)
    assert encoder.origin is not None
    if any(tensor.is_meta for tensor in encoder.origin.kept.values()):
        return None
    weights = [linear.weight for block in encoder.blocks for linear in block.linears]
    longest = max(weight.numel() for weight in weights)
    read = _Reader(encoder.family, places, torch.empty(longest, dtype=weights[0].dtype, device="cpu"))
    for i, block in enumerate(encoder.blocks):
        materialise_block(block, mode, partial(read, f"{layers}.{i}", block))
    return encoder


def _without_layers(name_or_path: str, modality: str, **options: Any) -> tuple[PreTrainedModel, str]:
    """The model with its layers on the meta device, and their path."""
    model_class, more = class_for(name_or_path, modality)
    if not issubclass(model_class, PreTrainedModel):
        raise _Whole
    aside: dict[str, nn.Module] = {}

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)  # transformers' loader builds it on the meta device
        if getattr(config, "quantization_config", None) is not None:
            raise _Whole
        try:
            path = family_of(self).layers
        except ValueError as error:  # which is said of the whole model
            raise _Whole from error
        aside[path] = self.get_submodule(path)
        self.set_submodule(path, nn.ModuleList())
        self._keys_to_ignore_on_load_unexpected |= {rf"{path}\."}  # or they are reported as unexpected

    # Its name stays: families know their models by it.
    bare: Any = type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})
    model = bare.from_pretrained(name_or_path, **more, **options)
    model.__class__ = model_class
    ((path, layers),) = aside.items()
    model.set_submodule(path, layers)
    return model, path


def _places(model: PreTrainedModel, layers: str, files: list[str]) -> dict[str, Place]:
    """Where every tensor of the layers lies, by its name in the model."""
    expected, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    places: dict[str, Place] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - no mapping
        for key, shape in shapes.items():
            name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if name not in expected and key in expected:
                name, converted = key, None
            if name not in expected or not name.startswith(f"{layers}."):
                continue
            if converted or name in places or list(expected[name].shape) != shape:
                raise _Whole
            places[name] = Place(file, key)
    if any(name.startswith(f"{layers}.") and name not in places for name in expected):
        raise _Whole
    return places


@dataclass(frozen=True)
class _Reader:
    """Values of blocks, read from where they lie.

    Args:
        room: `[n]`, as long as the longest weight. Each is read into it and quantised from there: memory taken and
            freed between what is kept would leave holes.
    """

    family: Family
    places: dict[str, Place]
    room: Tensor

    def __call__(self, layer: str, block: Block, name: str, parameter: Tensor) -> Tensor:
        """What the checkpoint has for a parameter of a block; a bias that one of several linears lacks is zero."""
        if any(parameter is linear.weight for linear in block.linears):
            value = self.room[: parameter.numel()].view(parameter.shape)
        else:
            value = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
        for path, rows in _sources(block, self.family, name):
            if (place := self.places.get(f"{layer}.{path}")) is not None:
                with safe_open(place.file, "pt") as opened:  # for each: what was read stays mapped until it is closed
                    value[rows] = opened.get_tensor(place.key)
        return value


def _sources(block: Block, family: Family, name: str) -> Iterator[tuple[str, slice]]:
    """The tensors of a layer that a parameter of its block is made of, and the rows that each takes."""
    owner, _, leaf = name.rpartition(".")
    module = block.get_submodule(owner)
    if not isinstance(module, LoraLinear):
        path = family.vectors[owner or leaf]
        yield f"{path}.{leaf}" if owner else path, slice(None)
        return
    for path, roles in family.linears.items():
        if roles[0] in module.roles:
            yield f"{path}.{leaf}", slice(module.rows_of(roles[0]).start, module.rows_of(roles[-1]).stop)
