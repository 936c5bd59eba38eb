"""PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`, for one encoder each.

A key is `base_model.model.<module>.lora_A.weight` `[r, in]` or `.lora_B.weight` `[out, r]`. The scaling is not stored:
it is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA, alpha and r by patterns over names of modules. Which modules are
adapted is read from the keys, whatever spelling of `target_modules` has chosen them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

from .adapters import LowRank, adapted_linears, linear_of, low_ranks, set_low_ranks
from .encoders import Encoder
from .lora_config import PEFT_READ, PEFT_WITHOUT_EFFECT
from .peft_names import Names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

READ = {*PEFT_READ, "rank_pattern", "alpha_pattern", "bias"}
# Where adapters lie is read from the tensors; the rest says how they were drawn, or nothing of what they compute.
WITHOUT_EFFECT = {
    *PEFT_WITHOUT_EFFECT,
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "init_lora_weights", "eva_config"),
}
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # ways to draw adapters; others change the weights

ByLayer = dict[tuple[int, str], LowRank]  # (layer, role) -> its adapter


def write_folder(folder: Path, encoder: Encoder) -> None:
    """Write the adapters of an encoder as PEFT and transformers read them onto its plain Hugging Face model."""
    names = Names(encoder)
    adapters: dict[str, LowRank] = {}
    for i, block in enumerate(encoder.blocks):
        for path, roles in encoder.family.linears.items():
            found = low_ranks(linear := linear_of(block, roles[0]))
            if set(roles) & set(found):
                rows = dict(zip(roles, linear.widths_of(roles), strict=True))
                adapters[names.module(i, path)] = side_by_side(found, rows)
    ranks = {name: part.a.shape[0] for name, part in adapters.items()}
    alphas = {name: part.scaling * ranks[name] for name, part in adapters.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": encoder.name_or_path or None,
        "inference_mode": True,
        "target_modules": sorted(adapters),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": max(linear.dropout for linear in adapted_linears(encoder).values()),
        "bias": "none",
    }
    sides = {f"{PREFIX}{n}.lora_{side}.weight": t for n, x in adapters.items() for side, t in (("A", x.a), ("B", x.b))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: t.cpu().contiguous() for key, t in sides.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def side_by_side(parts: Mapping[str, LowRank], rows: Mapping[str, int]) -> LowRank:
    """The adapters of the roles that one linear of Hugging Face computes, as one: `rows` are theirs of its output.

    Roles that share A (as adapters of a fused linear do when they are loaded) keep one; others lie on a diagonal.
    """
    adapted = [parts[role] for role in rows if role in parts]
    first = adapted[0]
    if len(adapted) == len(rows) and all(torch.equal(part.a, first.a) for part in adapted):
        return LowRank(first.a, torch.cat([part.b for part in adapted]), first.scaling)
    blocks = [parts[role].b if role in parts else first.b.new_zeros(size, 0) for role, size in rows.items()]
    return LowRank(torch.cat([part.a for part in adapted]), torch.block_diag(*blocks), first.scaling)


def load_folder(source: str | os.PathLike, encoder: Encoder, modality: str) -> None:
    """Put the adapter of a PEFT folder in place of an encoder's own.

    Args:
        source: a folder or hub id, which holds the adapter itself or in a subfolder named `modality`.
        encoder: as it was, where the adapter cannot be loaded.

    Raises:
        ValueError: there is no such folder, it is damaged, does not fit the encoder, or asks for something that
            u2a_fast does not compute.
    """
    adapters, dropout = _read_folder(source, encoder, modality)
    for i, block in enumerate(encoder.blocks):
        for linear in block.linears:
            given = {role: adapters[i, role] for role in linear.roles if (i, role) in adapters}
            set_low_ranks(linear, given, dropout)


def _read_folder(source: str | os.PathLike, encoder: Encoder, modality: str) -> tuple[ByLayer, float]:
    """The adapters in a PEFT folder, and their dropout."""
    config_file, weights_file = _files(source, modality)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        tensors = load_file(weights_file)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the adapter in {source} is damaged: {why}") from error
    try:
        _check_config(config)
        return _by_layer(config, tensors, encoder), float(config.get("lora_dropout") or 0)
    except ValueError as error:
        raise ValueError(f"the adapter in {source} cannot be loaded: {error}") from error


def _files(source: str | os.PathLike, modality: str) -> tuple[Path, Path]:
    """Where config and weights lie, on this machine; only a hub id is asked for over the network."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"an adapter is a folder or a hub id, not {type(source).__name__}")
    for subfolder in ("", modality):
        options = {"subfolder": subfolder, "_raise_exceptions_for_missing_entries": False}
        try:
            config, weights = (cached_file(source, name, **options) for name in (CONFIG, WEIGHTS))
        except (OSError, ValueError) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{source} is no folder of an adapter, nor one of the Hugging Face hub: {why}") from error
        if config is not None and weights is not None:
            return Path(config), Path(weights)
        if config is not None:
            raise ValueError(
                f"{source} holds no {WEIGHTS}, and adapter_model.bin is not read, since a pickle can run code: "
                "save the adapter again with safe_serialization=True"
            )
    raise ValueError(f"{source} holds no {CONFIG}: name a folder that PEFT or save_adapters has written")


def _check_config(config: Any) -> None:
    """Refuse what is no LoRA, or more than we compute."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"its peft_type is {kind!r}, and only LORA is computed")
    asked = sorted(name for name, value in config.items() if value and name not in READ | WITHOUT_EFFECT)
    if config.get("bias", "none") != "none":
        asked.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights") not in KEEP_THE_BASE:
        asked.append(f"init_lora_weights={config['init_lora_weights']!r} (it changes the base weights)")
    if asked:
        raise ValueError(f"it asks for {', '.join(asked)}, which u2a_fast does not compute")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"its {name} is no dictionary")
    for name, value in {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}.items():
        _check_number(name, config.get(name, value))
    if not 0 <= (config.get("lora_dropout") or 0) < 1:
        raise ValueError(f"its lora_dropout is {config['lora_dropout']}, which is not in [0, 1)")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"its {name} is {value!r}, which is no number")


def _by_layer(config: dict[str, Any], tensors: Mapping[str, Tensor], encoder: Encoder) -> ByLayer:
    names, adapters = Names(encoder), {}
    for module, sides in _modules(tensors).items():
        place = names.place(module)
        if place is None:
            continue
        layer, roles = place
        part = _low_rank(config, module, sides)
        linear = linear_of(encoder.blocks[layer], roles[0])
        sizes = linear.widths_of(roles)
        if part.a.shape[1] != linear.in_features or part.b.shape[0] != sum(sizes):
            found, wanted = (part.a.shape[1], part.b.shape[0]), (linear.in_features, sum(sizes))
            raise ValueError(f"{module} has {found[0]} inputs and {found[1]} outputs, not {wanted[0]} and {wanted[1]}")
        exact = torch.promote_types(encoder.dtype, torch.float32)
        for role, b in zip(roles, part.b.split(sizes), strict=True):
            if (layer, role) in adapters:
                raise ValueError(f"{module} is there twice, under two names")
            adapters[layer, role] = LowRank(part.a.to(exact), b.to(exact), part.scaling)
    if not adapters:
        raise ValueError("it holds no adapter of a linear of the encoder's layers")
    return adapters


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{module: {"A": [r, in], "B": [out, r]}}`, complete and of equal rank."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise ValueError(f"it holds the tensor {key[:200]!r}, which u2a_fast does not compute with")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise ValueError(f"{key[:200]!r} is {tensor.dtype} {list(tensor.shape)}, not a matrix of floating point")
        modules.setdefault(match["module"], {})[match["side"]] = tensor
    for module, sides in modules.items():
        if len(sides) < 2 or sides["A"].shape[0] != sides["B"].shape[1] or not sides["A"].shape[0]:
            shapes = ", ".join(f"{side} {list(tensor.shape)}" for side, tensor in sorted(sides.items()))
            raise ValueError(f"{module[:200]} has the factors {shapes}, not A [r, in] and B [out, r]")
    return modules


def _low_rank(config: dict[str, Any], module: str, sides: Mapping[str, Tensor]) -> LowRank:
    rank = sides["A"].shape[0]
    said = by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8))
    if rank != said:
        raise ValueError(f"{module} has rank {rank} in the tensors, and {said} in the config")
    alpha = by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return LowRank(sides["A"], sides["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT looks it up.

    >>> by_pattern({"attention.query": 2, ".*0.*key": 4}, "encoder.layer.0.attention.self.key", 8)
    4
    """
    for pattern, value in patterns.items():
        # What repeats repetitions can run for ever.
        if len(re.findall(r"(?<!\()[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
            raise ValueError(f"the pattern {pattern[:200]!r} is too involved: write names of modules")
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"the pattern {pattern[:200]!r} is no regular expression") from error
        if found:
            _check_number(f"value of the pattern {pattern[:200]!r}", value)
            return value
    return default
