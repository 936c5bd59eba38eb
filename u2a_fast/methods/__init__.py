"""The methods, each short enough that the paper's figure shows through, and the baseline they are held against."""

from __future__ import annotations

import os
from typing import Any

from .base import MultimodalModel
from .joint_embedding import JointEmbedding
from .late_fusion import LateFusion
from .pmf import PMF
from .saved import first_line, read_config
from .u2a import U2A

METHODS = {method.config_class.model_type: method for method in (U2A, PMF, JointEmbedding, LateFusion)}

__all__ = ["METHODS", "PMF", "U2A", "JointEmbedding", "LateFusion", "MultimodalModel", "load_model"]


def load_model(name_or_path: str | os.PathLike, **options: Any) -> MultimodalModel:
    """`from_pretrained` of whichever method the folder's config names.

    Args:
        name_or_path: a folder written by `save_pretrained`, or a hub id.
        options: of that method's `from_pretrained`, for example `encoders={"text": folder}`.

    Raises:
        ValueError: there is no config, or it names none of ours.
    """
    try:
        kind = read_config(name_or_path).get("model_type")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} is no folder of a trained model, nor a model of the Hugging Face hub: name the output_dir "
            f"of a run that has ended ({first_line(error)})"
        ) from error
    if not isinstance(kind, str) or kind not in METHODS:
        raise ValueError(f"{name_or_path} holds a {kind!r} model: u2a_fast loads {', '.join(METHODS)}")
    return METHODS[kind].from_pretrained(name_or_path, **options)
