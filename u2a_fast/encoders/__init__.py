"""Hugging Face encoders as `embed -> blocks -> finish`."""

from .base import Encoder, Family
from .build import from_pretrained_model, load, without_adapters
from .streaming import load_encoder

__all__ = ["Encoder", "Family", "from_pretrained_model", "load", "load_encoder", "without_adapters"]
