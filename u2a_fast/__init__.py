"""Joint fine-tuning of frozen unimodal encoders for multimodal tasks, with any modality missing in any sample."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import encoders, kernels
    from .data import MissingPattern, MultimodalCollator
    from .evaluation import evaluate
    from .kernels import get_backend, set_backend
    from .lora_config import LoraConfig
    from .methods import PMF, U2A, JointEmbedding, LateFusion, load_model

__version__ = "0.2.0"

# Loaded when first asked for: the kernels alone need neither transformers nor torchmetrics, which take seconds.
_HOME = {
    "PMF": "methods",
    "U2A": "methods",
    "JointEmbedding": "methods",
    "LateFusion": "methods",
    "LoraConfig": "lora_config",
    "MissingPattern": "data",
    "MultimodalCollator": "data",
    "evaluate": "evaluation",
    "get_backend": "kernels",
    "load_model": "methods",
    "set_backend": "kernels",
}
_MODULES = ("encoders", "kernels")

__all__ = [
    "PMF",
    "U2A",
    "JointEmbedding",
    "LateFusion",
    "LoraConfig",
    "MissingPattern",
    "MultimodalCollator",
    "encoders",
    "evaluate",
    "get_backend",
    "kernels",
    "load_model",
    "set_backend",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
