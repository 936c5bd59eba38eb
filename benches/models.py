"""Encoders, batches and the same training step written with transformers + PEFT: what the step benches compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from arms import DEVICE
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast import MissingPattern
from u2a_fast.gpu_report import models
from u2a_fast.gpu_report.models import (
    ALPHA,
    CLASSES,
    NO_DROPOUT,
    RANK,
    Inputs,
    Models,
    PeftU2A,
    even_lengths,
    loss_of,
    with_peft,
)
from u2a_fast.gpu_report.modern_step import texts
from u2a_fast.memory import saved_bytes

__all__ = [
    "ALPHA",
    "CLASSES",
    "NO_DROPOUT",
    "RANK",
    "PeftU2A",
    "even_lengths",
    "loss_of",
    "with_peft",
]  # the GPU report's too

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def vit_and_bert(layers: int, dtype: torch.dtype = torch.float32, image_size: int = 224, **sizes: int) -> Models:
    """ViT-B/16 and BERT-base with weights as drawn, cut to `layers`; other widths through `sizes`."""
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=layers, image_size=image_size, **sizes)
    image = ViTModel(config, add_pooling_layer=False)
    text = BertModel(BertConfig(num_hidden_layers=layers, **NO_DROPOUT, **sizes), add_pooling_layer=False)
    return {name: model.eval().to(DEVICE, dtype) for name, model in (("image", image), ("text", text))}


def tiny_encoders(layers: int = 2, dtype: torch.dtype = torch.float32) -> Models:
    return vit_and_bert(layers, dtype, image_size=32, **TINY)


def presence_table(batch: int, missing_rate: float) -> Tensor:
    return MissingPattern(rate=missing_rate, kind="both").table(batch, ("image", "text"))


def make_batch(lengths: Tensor, present: Tensor, image_size: int = 224) -> Inputs:
    """A batch as our collator makes it: pictures of zeros, and one token behind which all is padding, where absent."""
    generator, batch = torch.Generator().manual_seed(0), len(lengths)
    has_image, has_text = present.unbind(1)
    text = texts(lengths)
    text["input_ids"][~has_text] = 0
    text["attention_mask"][~has_text] = 0
    text["input_ids"][~has_text, 0], text["attention_mask"][~has_text, 0] = 101, 1
    pictures = torch.randn(batch, 3, image_size, image_size, generator=generator) * has_image[:, None, None, None]
    made = {
        "image": {"pixel_values": pictures},
        "text": text,
        "modality_mask": present,
        "labels": torch.randint(0, CLASSES, (batch,), generator=generator),
    }
    return on_device(made)


def on_device(tree: Any) -> Any:
    return models.on_device(tree, DEVICE)


def real_rows(batch: Inputs) -> int:
    """Rows that an encoder has to run, one mask token in each sample included."""
    has_image, has_text = batch["modality_mask"].unbind(1)
    side = batch["image"]["pixel_values"].shape[2]
    patches = (side // 16) ** 2 + 1
    tokens = batch["text"]["attention_mask"][has_text].sum()
    return int(has_image.sum() * (patches + 1) + tokens + has_text.sum())


def step(model: nn.Module, *inputs: Any, **batch: Any) -> Callable[[], None]:
    """A training step but for the optimizer's."""
    return lambda: loss_of(model(*inputs, **batch)).backward()


def kept_by(model: nn.Module, *inputs: Any, **batch: Any) -> int:
    """Bytes that a step keeps for backward, parameters not counted."""
    return saved_bytes(lambda: loss_of(model(*inputs, **batch)), model.parameters())
