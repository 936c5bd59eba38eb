"""Where encoders, processors and trained weights come from."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoFeatureExtractor, AutoTokenizer, BitsAndBytesConfig, ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# Not from the package itself: that of transformers 5.17 has it only beside torchvision, which nothing here needs.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .. import encoders as encoders_module
from ..encoders import Encoder, without_adapters
from .config import MOST_CLASSES, check_count, constructor_arguments
from .saved import first_line, saved_folder

logger = logging.getLogger(__name__)

RESERVED = ("modality_mask", "label", "labels", "return_dict", "self")  # keywords of forward, columns of a sample
DINOV3_DEFAULTS = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
# What transformers' from_pretrained takes and ours does not.
NOT_SUPPORTED = {
    "device_map": "the encoders of a model meet in every step, so two devices would take turns; call model.to(device), "
    "and start one process a device to use several",
    "attn_implementation": "attention is computed by our own kernels, which set_backend chooses; leave it out",
    "torch_dtype": "it is called dtype",
} | dict.fromkeys(
    ("cache_dir", "force_download", "local_files_only", "revision", "token"),
    "set HF_HOME, HF_TOKEN or HF_HUB_OFFLINE, or pass the folder that huggingface_hub.snapshot_download gives",
)
FIXED_LENGTH = ("siglip_text_model", "siglip2_text_model")
PROCESSORS = {
    **{"image": AutoImageProcessor, "text": AutoTokenizer, "audio": AutoFeatureExtractor},
    "video": AutoImageProcessor,
}


def check_parts(encoders: Any, num_labels: Any) -> None:
    """Refuse encoders that are no dictionary, and no number of classes."""
    if not isinstance(encoders, Mapping | nn.ModuleDict):
        raise TypeError(f"encoders must be a dictionary {{modality: encoder}}, not {type(encoders).__name__}")
    check_count("num_labels", num_labels, 1, MOST_CLASSES)


def as_encoder(
    name: str, given: str | nn.Module, dtype: torch.dtype | None, mode: str | None, in_8bit: bool = False
) -> Encoder:
    """A module, hub id or folder as an `Encoder`; `dtype`, `mode` (of quantization) and `in_8bit` (by bitsandbytes)
    hold where it is loaded."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"modality name {name!r} must be an identifier, since forward takes it as a keyword")
    if name in RESERVED or hasattr(nn.ModuleDict, name):
        raise ValueError(f"modality name {name!r} has another meaning: choose a name such as 'image'")
    if isinstance(given, Encoder):
        encoder = without_adapters(given)
        if given.was_trained:  # under its name lies another
            encoder.name_or_path = ""
    elif isinstance(given, nn.Module):
        encoder = encoders_module.from_pretrained_model(given)
    elif isinstance(given, (str, os.PathLike)):
        options = {} if dtype is None else {"dtype": dtype}
        if in_8bit:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        encoder = encoders_module.load_encoder(str(given), name, mode, **options)
    else:
        raise TypeError(f"encoder {name!r} must be a module, a hub id or a folder, not {type(given).__name__}")
    return encoder


def check_overrides(model_class: Any, overrides: Mapping[str, Any]) -> None:
    """ValueError where `from_pretrained` is asked for what is no argument of the model, before anything is loaded."""
    known = constructor_arguments(model_class)
    unknown = next((name for name in overrides if name not in known), None)
    if unknown is not None:
        why = NOT_SUPPORTED.get(unknown, f"pass any of encoders, dtype, {', '.join(known)}")
        raise ValueError(f"{unknown} is not supported: {why}")


def load_processor(name: str, source: str) -> Any:
    """The processor in the folder or hub id `source` of the modality `name`."""
    if name not in PROCESSORS or not source:
        raise ValueError(f"no processor for {name!r} is known: set model.processors = {{{name!r}: ...}}")
    try:
        return PROCESSORS[name].from_pretrained(source, trust_remote_code=False)
    except ImportError as error:
        if name == "image" and (processor := _dinov3_processor(source)) is not None:
            return processor
        raise ValueError(
            f"the processor for {name!r} in {source} needs a package: install it, or set model.processors = "
            f"{{{name!r}: ...}} ({first_line(error)})"
        ) from error
    except Exception as error:  # whatever the libraries make of a damaged file
        raise ValueError(
            f"{source} holds no processor for {name!r}: set model.processors = {{{name!r}: ...}} ({first_line(error)})"
        ) from error


def _dinov3_processor(source: str) -> ViTImageProcessorPil | None:
    """DINOv3's own exists beside torchvision only. This one resizes before it scales, and so rounds once to 8 bits."""
    settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
    if settings.pop("image_processor_type", "").removesuffix("Fast") != "DINOv3ViTImageProcessor":
        return None
    logger.warning("%s: DINOv3's image processor needs torchvision; ViT's stands in, with its settings", source)
    return ViTImageProcessorPil(**DINOV3_DEFAULTS | settings)


def fitted_processor(processor: Any, encoder: Encoder) -> Any:
    """A video's processor that knows how many frames its encoder takes, and a tokenizer that knows how many tokens.

    It is a copy where it knew it otherwise: the caller's may serve another model too. The limit of tokens is lowered to
    the positions that there are; many tokenizers know none, or one too many. SigLIP's texts all have that length,
    whichever tokenizer makes them.
    """
    frames = getattr(encoder.config, "num_frames", None)
    if frames is not None:
        return _with(processor, num_frames=frames)
    tokenizer = getattr(processor, "tokenizer", processor)
    tables = (
        module
        for name, module in encoder.stem.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2].startswith("position_embedding")
    )
    table = next(tables, None)
    if table is None or not hasattr(tokenizer, "model_max_length"):
        return processor
    # RoBERTa counts positions from behind the padding's.
    positions = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    limits: dict[str, Any] = {"model_max_length": min(tokenizer.model_max_length, positions)}
    if encoder.config.model_type in FIXED_LENGTH:
        limits["fixed_length"] = True
    fitted = _with(tokenizer, **limits)
    return fitted if tokenizer is processor else _with(processor, tokenizer=fitted)


def _with(processor: Any, **settings: Any) -> Any:
    """The processor with these settings: itself where it has them, else a copy."""
    if all(getattr(processor, name, None) == value for name, value in settings.items()):
        return processor
    processor = copy.copy(processor)
    for name, value in settings.items():
        setattr(processor, name, value)
    return processor


def saved_processors(source: str | os.PathLike) -> dict[str, Any]:
    """The processors that `save_pretrained` left under a folder or hub id, each in a folder named by its modality.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    folder = saved_folder(source, "processors")
    return {path.name: _saved_processor(path) for path in sorted(folder.glob("*/"))}


def _saved_processor(folder: Path) -> Any:
    try:
        return _processor_class(folder).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever the libraries make of a damaged file
        raise ValueError(f"the processor in {folder} cannot be loaded: {first_line(error)}") from error


def _processor_class(folder: Path) -> Any:
    """The auto class for a processor's folder: from the modality's name, or else from the files in it."""
    if folder.name in PROCESSORS:
        return PROCESSORS[folder.name]
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    return AutoFeatureExtractor if "feature_extractor_type" in settings else AutoImageProcessor


def overlay(model: Any, state: dict[str, torch.Tensor], source: str) -> None:
    """Load what was trained over the encoders; ValueError, before anything changes, where it does not fit them."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    unexpected = sorted(set(state) - set(own))
    missing = sorted(set(own) - set(state) - model._keys_to_ignore_on_save)
    reshaped = [name for name in state if name in own and state[name].shape != own[name]]
    problems = {"unexpected": unexpected, "missing": missing, "of another shape": reshaped}
    found = ", ".join(f"{kind} {names[:3]}" for kind, names in problems.items() if names)
    if found:
        raise ValueError(f"{source} does not fit these encoders: {found}")
    model.remember(state)
    model.load_state_dict(state, strict=False)
