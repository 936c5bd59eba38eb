"""What was promised, by class of machine. A figure that misses its limit is a failed bench; limits are not softened."""

from __future__ import annotations

import math
from typing import NamedTuple


class Limit(NamedTuple):
    least: float = -math.inf
    most: float = math.inf

    @property
    def number(self) -> float:
        return self.most if math.isinf(self.least) else self.least

    def __str__(self) -> str:
        return f"at most {self.most}" if math.isinf(self.least) else f"at least {self.least}"


def at_least(number: float) -> Limit:
    return Limit(least=number)


def at_most(number: float) -> Limit:
    return Limit(most=number)


# Ratios of medians in one run. "over" is the time of the first named over the second's; "gain" the other way round.
EVERY_CPU = {
    "dispatch: block over PEFT's layer": at_most(0.6),
    "dispatch: block without gradient over PEFT's layer": at_most(0.7),
    "dispatch: linear_lowrank over aten": at_most(1.6),
    "dispatch: Triton's block over ATen's": at_most(1.2),
    **{f"lora_linear 768 -> 3072, r {r}: over frozen": at_most(1.15) for r in (8, 16)},
    **{f"lora_linear 768 -> 768, r {r}: over frozen": at_most(1.25) for r in (8, 16)},
    **{
        f"lora_linear {shape}, r {r}: over the best aten arm": at_most(1.0)
        for shape in ("768 -> 768", "768 -> 3072", "3072 -> 768")
        for r in (64, 128)
    },
    "block ViT-B: fraction of the GEMM peak": at_least(0.85),
    "block BERT-base: fraction of the GEMM peak": at_least(0.85),
    "u2a_step emoji: gain over the best PEFT arm": at_least(1.9),
    "u2a_step emoji: gain over computing absent rows": at_least(1.4),
    "u2a_step: padded over the same rows without padding": at_most(1.05),
    "u2a_step: saved bytes, padded over without padding": at_most(1.05),
    "u2a_step: worst deviation from a line in real rows": at_most(0.05),
    "modern_encoders ModernBERT-base: gain over the best PEFT arm": at_least(1.2),
    "modern_encoders ModernBERT-base, padded: gain over the best PEFT arm": at_least(1.2),
    "modern_encoders Qwen3-Embedding-0.6B, 2 layers: gain over the best PEFT arm": at_least(1.1),
    "modern_encoders DINOv3-S: gain over the best PEFT arm": at_least(1.1),
    "pmf layer over plain layers, fp32": at_most(1.25),
    "pmf layer over plain layers, bf16": at_most(1.25),
    "cache: gain of a cached epoch": at_least(4.0),
    "memory: saved bytes over PEFT": at_most(0.6),
    "memory: saved bytes with checkpointing over PEFT": at_most(0.2),
}

LIMITS = {
    "cpu-no-avx512": {
        **EVERY_CPU,
        "u2a_step ViT-B + BERT-base, 70% missing: gain over the best PEFT arm": at_least(2.1),
        "u2a_step ViT-B + BERT-base, full presence: gain over the best PEFT arm": at_least(1.35),
    },
    "cpu-avx512-bf16": {
        **EVERY_CPU,
        "u2a_step ViT-B + BERT-base, 70% missing: gain over the best PEFT arm": at_least(2.4),
        "u2a_step ViT-B + BERT-base, full presence: gain over the best PEFT arm": at_least(1.5),
        "u2a_step ViT-B + BERT-base, 70% missing: gain of int8 W8A8 over the best PEFT arm": at_least(2.8),
        "u2a_step ViT-B + BERT-base, full presence: gain of int8 W8A8 over the best PEFT arm": at_least(1.7),
        "u2a_step ViT-B + BERT-base, 70% missing: gain over PEFT fp32": at_least(8.0),
        "u2a_step ViT-B + BERT-base, full presence: gain over PEFT fp32": at_least(4.5),
        **{f"attention, {tokens} tokens: gain over SDPA": at_least(1.5) for tokens in (64, 128, 197, 256)},
        "int8: W8A8 block forward, gain over bf16": at_least(1.3),
        "int8: W8A8 block forward, gain over Linear8bitLt": at_least(1.5),
    },
}


def limits_of(device_class: str) -> dict[str, Limit]:
    """Of a GPU, and of a CPU between the two classes, nothing was promised."""
    return LIMITS.get(device_class, {})
