"""What training takes, in bytes: weights, gradients, optimizer states and what autograd keeps for backward.

`plan` counts for encoders that need not exist: it runs two and three layers of them on fake tensors (shapes without
numbers) and multiplies, so that encoders of ten thousand million parameters take seconds on a laptop. `memory_report`
counts a model that is there. Both set ours beside PEFT's LoRA and full fine-tuning of the same encoders.

Not counted: workspaces of a single operation, the allocator's fragments, and the framework itself. Counts are those of
the CPU's paths; on a GPU flash attention keeps its result too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .block import Block
from .lora_config import LoraConfig
from .memory_counts import (
    Case,
    Counts,
    count_hugging_face,
    count_ours,
    dummy_inputs,
    extrapolate,
    read_config,
    saved_bytes,
    tensors_of,
    with_tokens,
)
from .methods import MultimodalModel
from .methods.presence import check_modalities
from .quantization import read_quantization

# Optimizer bytes for each trained parameter: two fp32 states, or two of 8 bit with an fp32 absmax per block of 256.
OPTIMIZERS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}
GPUS = (24, 48, 80)  # GB of common ones; what they have beyond 10^9 bytes each is left to what is not counted


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one way to train the same encoders."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def plan(
    encoder_configs: Mapping[str, str | os.PathLike | PreTrainedConfig],
    method: str = "u2a",
    batch: int = 32,
    quantization: Any = None,
    tokens: Mapping[str, int] | None = None,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    lora: LoraConfig | None = LoraConfig(r=8),  # noqa: B008 - frozen
    dtype: torch.dtype = torch.bfloat16,
) -> list[MemoryRow]:
    """What a training step would take, ours first, then PEFT's LoRA and full fine-tuning. Downloads configs only.

    Args:
        encoder_configs: `{modality: hub id, folder or Hugging Face config}`.
        method: `"u2a"`.
        batch: samples in a step, all modalities present.
        quantization: as in `U2A`.
        tokens: `{modality: rows of a sample}`; by default what the config gives, and 128 for texts.
        checkpointing: keep only the input of every block, in all three rows.
        optimizer: `"adamw"` (two fp32 states) or `"adamw_8bit"`.
        lora: ours, on the same roles for PEFT.
        dtype: of our frozen encoders where they are not quantised; fp32 means bf16 autocast over fp32 weights.

    Raises:
        ValueError: another method or optimizer, no samples, tokens of no modality, or an encoder that is not supported.

    >>> from transformers import BertConfig, ViTConfig
    >>> rows = plan({"image": ViTConfig(), "text": BertConfig()}, quantization="int8")
    >>> [row.name for row in rows]
    ['U2A, int8', 'PEFT LoRA, bf16 autocast', 'full fine-tuning, fp32']
    """
    if method != "u2a":
        raise ValueError(f"plan counts the method u2a, not {method!r}: build the model and call memory_report(model)")
    _check(batch, tokens or {}, optimizer, list(encoder_configs))
    configs = {m: with_tokens(read_config(c, m), (tokens or {}).get(m)) for m, c in encoder_configs.items()}
    modes = read_quantization(quantization, configs)
    case = Case(configs, batch, dict(tokens or {}), checkpointing, lora, modes, dtype)
    depths = {name: config.num_hidden_layers for name, config in configs.items()}
    ours = extrapolate(lambda layers: count_ours(case, layers), depths)
    stored = ", ".join(sorted({mode or str(dtype).removeprefix("torch.") for mode in modes.values()}))
    return [_row(f"U2A, {stored}", ours, optimizer), *_baselines(case, optimizer)]


def _check(batch: int, tokens: Mapping[str, int], optimizer: str, modalities: Sequence[str]) -> None:
    """Refuse before anything is counted."""
    if batch < 1:
        raise ValueError(f"a step needs samples: the batch must be at least 1, not {batch}")
    check_modalities(tokens, modalities)
    for name, rows in tokens.items():
        if rows < 1:
            raise ValueError(f"tokens of {name} must be at least 1, not {rows}: leave it out for what the config gives")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")


def _baselines(case: Case, optimizer: str) -> list[MemoryRow]:
    rows = []
    for title, adapt in (("PEFT LoRA, bf16 autocast", True), ("full fine-tuning, fp32", False)):
        counts = [_baseline(case, name, adapt) for name in case.configs]
        rows.append(_row(title, tuple(map(sum, zip(*counts, strict=True))), optimizer))
    return rows


def _baseline(case: Case, name: str, adapt: bool) -> Counts:
    depth = {name: case.configs[name].num_hidden_layers}
    return extrapolate(lambda layers: count_hugging_face(case, name, layers[name], adapt), depth)


def _row(name: str, counts: Counts, optimizer: str) -> MemoryRow:
    weights, trained, activations = counts
    return MemoryRow(name, weights, 4 * trained, round(OPTIMIZERS[optimizer] * trained), activations)


def memory_report(
    model: MultimodalModel, batch_size: int = 32, tokens: Mapping[str, int] | None = None, optimizer: str = "adamw"
) -> list[MemoryRow]:
    """The same rows for a model that is there, in its present state (frozen parts, storage, checkpointing).

    Its activations are measured on two small batches of dummy inputs, in training mode and, where the encoders are
    fp32, under bf16 autocast; they grow linearly with the batch. `print_plan` shows the rows as a table.

    Args:
        batch_size: samples in a step, every modality present.
        tokens: `{modality: rows of a sample}`; by default what the encoder's config gives, and 128 for texts.
        optimizer: `"adamw"` (two fp32 states) or `"adamw_8bit"`.
    """
    configs = {name: encoder.config for name, encoder in model.encoders.items()}
    _check(batch_size, tokens or {}, optimizer, list(configs))
    small = [_saved_by(model, configs, batch, tokens or {}) for batch in (2, 4)]
    activations = small[0] + (batch_size - 2) * (small[1] - small[0]) // 2
    weights = sum(t.numel() * t.itemsize for t in tensors_of(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = model.config.arguments.get("quantization") or dict.fromkeys(configs)
    kinds = sorted({stored[m] or str(e.dtype).removeprefix("torch.") for m, e in model.encoders.items()})
    ours = _row(f"{type(model).__name__}, {', '.join(kinds)}", (weights, trained, activations), optimizer)
    lora = model.config.arguments.get("lora")
    case = Case(
        configs={m: with_tokens(read_config(c, m), (tokens or {}).get(m)) for m, c in configs.items()},
        batch=batch_size,
        tokens=dict(tokens or {}),
        checkpointing=any(block.gradient_checkpointing for block in model.modules() if isinstance(block, Block)),
        lora=LoraConfig.read(lora) if lora else None,
        modes=stored,
        dtype=torch.float32,
    )
    return [ours, *_baselines(case, optimizer)]


def _saved_by(model: MultimodalModel, configs: Mapping[str, Any], batch: int, tokens: Mapping[str, int]) -> int:
    """Bytes kept by one training step of the model on dummy inputs, every modality present."""
    inputs = {m: dummy_inputs(with_tokens(c, tokens.get(m)), batch, tokens.get(m)) for m, c in configs.items()}
    inputs = {m: {k: v.to(model.device) for k, v in values.items()} for m, values in inputs.items()}
    for m, encoder in model.encoders.items():
        takes = inspect.signature(encoder.stem["embeddings"].forward).parameters if "embeddings" in encoder.stem else ()
        if tokens.get(m) and "interpolate_pos_encoding" in takes:
            inputs[m]["interpolate_pos_encoding"] = True
    present = torch.ones(batch, len(configs), dtype=torch.bool)
    labels = torch.zeros(batch, dtype=torch.long, device=model.device)
    if model.problem_type(labels) != "single_label_classification":
        labels = torch.zeros(batch, model.config.num_labels, device=model.device)

    def step() -> Tensor:
        logits, auxiliary = model.fuse(model.encode(inputs, present), present)
        return model.task_loss(logits, labels) + auxiliary

    autocast = all(encoder.dtype == torch.float32 for encoder in model.encoders.values())
    was_training, cache = model.training, getattr(model, "feature_cache", None)
    model.train()
    if cache is not None:
        model.feature_cache = None  # dummy samples are nothing to keep
    try:
        with (
            torch.enable_grad(),
            torch.random.fork_rng(),
            torch.autocast(model.device.type, torch.bfloat16, enabled=autocast),
        ):
            return saved_bytes(step, tensors_of(model))
    finally:
        model.train(was_training)
        if cache is not None:
            model.feature_cache = cache


def fits(rows: Sequence[MemoryRow]) -> str:
    """On which common GPUs there is room for the bytes of each row: computed from them, not tried.

    >>> fits([MemoryRow("little", 10**10, 0, 0, 0), MemoryRow("much", 10**11, 0, 0, 0)])
    'computed, for GPUs of 24, 48 and 80 GB: little fits from 24 GB on; much fits none of them'
    """
    said = []
    for row in rows:
        smallest = next((f"from {size} GB on" for size in GPUS if row.total <= size * 10**9), "none of them")
        said.append(f"{row.name} fits {smallest}")
    sizes = ", ".join(map(str, GPUS[:-1]))
    return f"computed, for GPUs of {sizes} and {GPUS[-1]} GB: {'; '.join(said)}"


def print_plan(rows: Sequence[MemoryRow]) -> None:
    """A table of the rows in GiB, each total also as a share of the last row's, and which common GPUs they fit."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="GiB in a training step", box=box.SIMPLE, padding=(0, 1))
    table.add_column("training", no_wrap=True)
    for name in ("weights", "gradients", "optimizer", "kept", "total", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        parts = (row.weights, row.gradients, row.optimizer, row.activations, row.total)
        table.add_row(row.name, *(f"{part / 2**30:.2f}" for part in parts), f"{row.total / rows[-1].total:.2f}")
    console = Console()
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum  # or headers are cut
    Console(width=max(console.width, needed)).print(table)
    console.print(fits(rows), soft_wrap=True)
