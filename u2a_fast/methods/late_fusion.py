"""The baseline: class tokens side by side, zeros for what is missing; with one encoder, a unimodal classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..encoders.frozen import add_adapters
from ..lora_config import LoraConfig, read_lora
from .base import MultimodalModel, PaddingMasks
from .config import MultimodalConfig


class LateFusionConfig(MultimodalConfig):
    model_type = "late_fusion"


class LateFusion(MultimodalModel):
    """`logits = W [c_1 ; ... ; c_M] + b` with `c_m = 0` where modality m is missing; LoRA inside the encoders.

    Takes the arguments that `U2A` has too, and a single encoder as well.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> model = LateFusion({"text": BertModel(BertConfig(vocab_size=9, **sizes))}, num_labels=3).eval()
    >>> model(text={"input_ids": torch.ones(2, 4).long()}).logits.shape
    torch.Size([2, 3])
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

    def encode(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None = None
    ) -> list[Tensor]:
        """One `[B, D_m]` per modality, zeros in absent rows."""
        rows, class_tokens = self.rows(inputs, present, padding), []
        for name, encoder in self.encoders.items():
            if name in rows:
                tokens, where = rows[name].embed(encoder)
                own, _ = encoder.read(tokens, where)
                class_tokens.append(rows[name].spread(own.to(self.head.weight.dtype), len(present)))
            else:
                class_tokens.append(self.head.weight.new_zeros(len(present), encoder.width))
        return class_tokens

    def fuse(self, encoded: list[Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
        present = host.send(present, self.head.weight.device)
        kept = [torch.where(present[:, i, None], tokens, 0) for i, tokens in enumerate(encoded)]
        logits = self.head(torch.cat(kept, dim=1))
        return logits, logits.new_zeros(())
