"""Joint fine-tuning of frozen unimodal encoders for multimodal tasks, with any modality missing in any sample."""

from . import encoders, kernels
from .data import MissingPattern, MultimodalCollator
from .evaluation import evaluate
from .kernels import get_backend, set_backend
from .lora import LoraConfig
from .methods import PMF, U2A, JointEmbedding, LateFusion, load_model

__version__ = "0.1.0"

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
