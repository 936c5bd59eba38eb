"""A training step, forward and backward, of one encoder of the 2020s under a head: ours and transformers + PEFT, bf16.

Weights as drawn, vocabularies cut, which no step's time depends on; nothing is missing. LoRA of rank 8 on attention's
linears: of ModernBERT's joint q, k and v three adapters of ours and one of PEFT's. Both read one row of a sample: the
first, or of Qwen3 the last real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..lora_config import LoraConfig
from ..methods import LateFusion
from .models import ALPHA, CLASSES, RANK, Inputs, even_lengths, on_device, with_peft
from .report import Entry, Report
from .u2a_step import BASE, Arm, kernels_of, time_arms

VOCABULARY = {"vocab_size": 20_000, "pad_token_id": 0}
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
BATCH = 32
Case = Callable[[], tuple[PreTrainedModel, Inputs]]


# -------------------------------------------------------------------------------------------------------------- models
def modernbert(**sizes: int) -> PreTrainedModel:
    special = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1)
    return transformers.ModernBertModel(transformers.ModernBertConfig(**VOCABULARY, **special, **sizes))


def qwen3(**sizes: int) -> PreTrainedModel:
    """Two layers of Qwen3-Embedding-0.6B, or other sizes."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 3072} | sizes
    heads = {"num_key_value_heads": sizes["num_attention_heads"] // 2, "head_dim": 128} | sizes
    return transformers.Qwen3Model(transformers.Qwen3Config(**VOCABULARY, rope_theta=1e6, use_cache=False, **heads))


def dinov3(**sizes: int) -> PreTrainedModel:
    """Without the chance that its positions are drawn by in training, which ours leave out."""
    options = {"num_register_tokens": 4, "pos_embed_rescale": None}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options | sizes))


def ours(model: PreTrainedModel, modality: str, dtype: torch.dtype) -> LateFusion:
    """A copy of the encoder in `dtype`, adapted, training, on the model's device."""
    own = {modality: copy.deepcopy(model).to(dtype)}
    return LateFusion(own, CLASSES, lora=LoraConfig(r=RANK, lora_alpha=ALPHA)).to(model.device).train()


class PeftClassifier(nn.Module):
    """The encoder's own forward under a head, as one writes it with transformers and PEFT.

    Args:
        attention: transformers' name of an implementation.
        autocast: compute in bf16 over the weights' own dtype.
    """

    def __init__(self, model: PreTrainedModel, attention: str = "sdpa", autocast: bool = False):
        super().__init__()
        self.encoder, self.autocast = with_peft(model, attention), autocast
        self.reads_last = model.config.model_type == "qwen3"
        self.head = nn.Linear(model.config.hidden_size, CLASSES)
        self.to(model.device)

    def forward(self, labels: Tensor, **inputs: Inputs) -> Tensor:
        (values,) = inputs.values()
        if "pixel_values" in values:
            values = {"pixel_values": values["pixel_values"].to(self.encoder.base_model.model.dtype)}
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.autocast):
            rows = self.encoder(**values).last_hidden_state  # [B, S, D]
        last = values["attention_mask"].sum(dim=1) - 1 if self.reads_last else torch.zeros_like(labels)
        return F.cross_entropy(self.head(rows[torch.arange(len(rows), device=rows.device), last].float()), labels)


# ------------------------------------------------------------------------------------------------------------- batches
def texts(lengths: Tensor) -> Inputs:
    """Random tokens of these lengths, padded to the longest on the right."""
    generator = torch.Generator().manual_seed(0)
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(1000, 20000, (len(lengths), longest), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def pictures(count: int, side: int) -> Inputs:
    return {"pixel_values": torch.randn(count, 3, side, side)}


def labelled(modality: str, inputs: Inputs) -> Inputs:
    size = len(next(iter(inputs.values())))
    return {modality: inputs, "labels": torch.arange(size) % CLASSES}


BASE_SIZE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
CASES: dict[str, Case] = {
    "ModernBERT-base, 16 to 512 tokens": lambda: (
        modernbert(),
        labelled("text", texts(even_lengths(BATCH, 16, 512))),
    ),
    "ModernBERT-base, 256 tokens": lambda: (modernbert(), labelled("text", texts(torch.full((BATCH,), 256)))),
    "Qwen3-Embedding-0.6B, 4 layers, 16 to 256 tokens": lambda: (
        qwen3(num_hidden_layers=4),
        labelled("text", texts(even_lengths(BATCH, 16, 256))),
    ),
    "DINOv3-B": lambda: (dinov3(**BASE_SIZE), labelled("image", pictures(BATCH, 224))),
}
TINY_CASES: dict[str, Case] = {
    "modernbert": lambda: (modernbert(**TINY, local_attention=4), labelled("text", texts(even_lengths(4, 2, 9)))),
    "qwen3": lambda: (qwen3(**TINY, head_dim=16), labelled("text", texts(even_lengths(4, 2, 9)))),
    "dinov3": lambda: (dinov3(**TINY, image_size=32), labelled("image", pictures(4, 32))),
}


# ----------------------------------------------------------------------------------------------------------- measuring
def measure(report: Report) -> None:
    for name, make in (TINY_CASES if report.dry else CASES).items():
        arms: dict[str, Arm] = {}
        batch: dict[str, Any] = {}
        report.measure(f"preparing {name}", prepare, make, arms, batch, report)
        if not arms:
            continue
        report.measure(name, time_arms, arms, batch, report.dry)
        for arm in () if report.dry else arms:
            report.measure(f"{name}: kernels of {arm}", kernels_of, arms[arm], batch)


def prepare(make: Case, arms: dict[str, Arm], batch: dict[str, Any], report: Report) -> Entry:
    torch.manual_seed(0)
    model, given = make()
    model = model.eval().to(report.device, torch.bfloat16)
    batch |= on_device(given, report.device)
    arms[BASE] = Arm(ours(model, next(iter(batch)), torch.bfloat16))
    arms["PEFT SDPA"] = Arm(PeftClassifier(model).train())
    return {}
