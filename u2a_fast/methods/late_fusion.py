"""The baseline: class tokens side by side, zeros for what is missing; with one encoder, a unimodal classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..encoders.frozen import add_adapters
from ..lora import LoraConfig, read_lora
from .base import MultimodalModel, packed_rows
from .config import MultimodalConfig


class LateFusionConfig(MultimodalConfig):
    model_type = "late_fusion"


class LateFusion(MultimodalModel):
    """`logits = W [c_1 ; ... ; c_M] + b` with `c_m = 0` where modality m is missing; LoRA inside the encoders.

    Takes the arguments that `U2A` has too, and a single encoder as well.
    """

    config_class = LateFusionConfig
    min_modalities = 1
    baseline = True

    def __init__(
        self,
        encoders: Mapping[str, str | nn.Module],
        num_labels: int,
        problem_type: str | None = None,
        lora: LoraConfig | None = LoraConfig(),  # noqa: B008 - frozen
        quantization: Any = None,
        all_absent: str = "error",
        processors: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
    ):
        lora = read_lora(lora)
        super().__init__(
            encoders,
            num_labels,
            problem_type,
            quantization,
            processors,
            all_absent=all_absent,
            label_smoothing=label_smoothing,
            lora=lora and lora.to_dict(),
        )
        add_adapters(self.encoders.values(), lora)
        self.head = nn.Linear(sum(encoder.width for encoder in self.encoders.values()), num_labels)
        self.post_init()

    @classmethod
    def recipe(cls, options: Any) -> dict[str, Any]:
        return {"lora": options.lora}

    def encode(self, inputs: Mapping[str, Mapping[str, Any]], present: torch.Tensor) -> list[torch.Tensor]:
        """One `[B, D_m]` per modality, zeros in absent rows."""
        tokens = []
        for i, (name, encoder) in enumerate(self.encoders.items()):
            index, rows = packed_rows(inputs.get(name, {}), present[:, i])
            class_token = self.head.weight.new_zeros(present.shape[0], encoder.width)
            if rows:
                embedded, padding_mask = encoder.embed(**rows)
                hidden = encoder.finish(encoder.run(embedded, padding_mask))
                here = encoder.class_token(hidden, padding_mask).to(class_token.dtype)
                class_token = class_token.index_copy(0, index, here)
            tokens.append(class_token)
        return tokens

    def fuse(self, encoded: list[torch.Tensor], present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = [torch.where(present[:, i, None], tokens, 0) for i, tokens in enumerate(encoded)]
        logits = self.head(torch.cat(kept, dim=1))
        return logits, logits.new_zeros(())
