"""What `save_pretrained` wrote, read back from a folder or the hub; nobody has to trust whoever made it.

JSON and safetensors alone are read, by names inside the folder, and checked before anything is built from them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers.utils import cached_file

from ..encoders.fingerprint import is_fingerprint
from ..encoders.streaming import INDEX, checkpoint_files
from .config import MOST_CLASSES, MultimodalConfig, constructor_arguments

CONFIG = "config.json"
DTYPES = ("float32", "float64", "bfloat16", "float16")

Result = TypeVar("Result")


def first_line(error: BaseException) -> str:
    """Of an error's message, for a sentence of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_config(source: str | os.PathLike) -> dict[str, Any]:
    """`config.json` under `source`, a folder or hub id. OSError or ValueError where there is none."""
    file = cached_file(source, CONFIG)
    if file is None:  # of a folder that is there
        raise ValueError(f"it holds no {CONFIG}")
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is damaged: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is damaged: it holds a {type(config).__name__}")
    return config


def saved_config(model_class: Any, source: str | os.PathLike) -> MultimodalConfig:
    """The config of a model of `model_class` under `source`.

    Raises:
        ValueError: there is none, it is of another method, or it is damaged.
    """
    config, kind = _tried(f"the config in {source}", lambda: read_config(source)), model_class.config_class.model_type
    if config.get("model_type") != kind:
        raise ValueError(f"{source} holds a {config.get('model_type')} model, not {kind}")
    found = next((what for what, fine in _checks(model_class, config) if not fine), None)
    if found is not None:
        raise ValueError(f"the config in {source} is damaged: {found}")
    # transformers gives a config no defaults of ours
    config = {"arguments": {}, "encoders_in_8bit": [], "fingerprints": {}} | config
    return _tried(f"the config in {source}", lambda: model_class.config_class.from_dict(config))


def _checks(model_class: Any, config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """What would have to be wrong with a config that was read from JSON, and whether it is not."""
    names, arguments = config.get("modalities"), config.get("arguments", {})
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return [(f"its modalities are {names!r:.200}, no list of names", False)]
    if not isinstance(arguments, dict):
        return [(f"its arguments are {arguments!r:.200}, no dictionary", False)]
    known = {*constructor_arguments(model_class)} - {"num_labels", "problem_type"}
    strange = sorted(set(arguments) - known)
    before, prints = config.get("quantized_from", {}), config.get("fingerprints", {})
    labels, counted = config.get("id2label"), config.get("num_labels", 1)
    return [
        ("a modality is there twice", len(set(names)) == len(names)),
        (f"{model_class.__name__} has no argument {strange[:1]}", not strange),
        ("its encoders do not name one of each modality", _by_name(config.get("encoders"), names, lambda given: True)),
        (
            f"its encoder_dtypes are not out of {', '.join(DTYPES)} for each modality",
            _by_name(config.get("encoder_dtypes"), names, DTYPES.__contains__),
        ),
        (
            f"its quantized_from is not out of {', '.join(DTYPES)} by modality",
            isinstance(before, dict) and _by_name(before, [*before], DTYPES.__contains__),
        ),
        (
            "its fingerprints are none of encoders",
            isinstance(prints, dict) and _by_name(prints, [*prints], is_fingerprint),
        ),
        ("its encoders_in_8bit are no list of modalities", _part_of(config.get("encoders_in_8bit", []), names)),
        ("its id2label is no dictionary of names", labels is None or _class_names(labels)),
        ("its label2id is no dictionary", isinstance(config.get("label2id", {}), dict)),
        (f"its num_labels is {counted!r:.200}", type(counted) is int and 1 <= counted <= MOST_CLASSES),
    ]


def _by_name(given: Any, names: list[str], fine: Callable[[str], bool]) -> bool:
    """Whether it is `{name: string}` for every name, all of them fine."""
    return isinstance(given, dict) and all(isinstance(given.get(name), str) and fine(given[name]) for name in names)


def _part_of(given: Any, names: list[str]) -> bool:
    return isinstance(given, list) and all(name in names for name in given)


def _class_names(given: Any) -> bool:
    if not isinstance(given, dict) or len(given) > MOST_CLASSES:
        return False
    return set(given) == {str(i) for i in range(len(given))} and all(isinstance(name, str) for name in given.values())


def saved_folder(source: str | os.PathLike, name: str) -> Path:
    """The folder `name` below `source`, a folder or hub id, on this machine; it may be absent."""
    if Path(source).is_dir():
        return Path(source) / name
    return Path(snapshot_download(str(source), allow_patterns=[f"{name}/*"])) / name


def saved_state(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """What `save_pretrained` wrote under `source`, a folder or hub id, in one file or several.

    Raises:
        ValueError: a file is damaged, or the index names one that is not beside it.
    """
    files = _tried(f"{INDEX} in {source}", lambda: checkpoint_files(source))
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= _tried(f"{Path(file).name} in {source}", partial(load_file, file))
    return state


def _tried(what: str, read: Callable[[], Result]) -> Result:
    """`read()`; ValueError, whatever a damaged file has raised there."""
    try:
        return read()
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {first_line(error)}") from error
