"""Who has which modality: the checked mask of a batch, and the rows that are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from .. import host
from ..encoders import Encoder
from ..padding import Padding, padding_of


def presence(modalities: Sequence[str], inputs: Mapping[str, Any], modality_mask: Tensor | None) -> Tensor:
    """The presence mask of a batch, bool `[B, M]`, where it was given; a modality without a keyword is absent.

    Shapes and dtypes are checked, values are not (see `refuse_empty`).
    """
    check_modalities(inputs, modalities)
    batches = {name: _batch(name, values) for name, values in inputs.items()}
    batches = {name: count for name, count in batches.items() if count is not None}
    if not batches:
        raise ValueError(
            f"the batch holds none of {', '.join(modalities)}: if Trainer dropped the columns, "
            "pass TrainingArguments(remove_unused_columns=False)"
        )
    batch = next(iter(batches.values()))
    if modality_mask is None:
        modality_mask = torch.ones(batch, len(modalities), dtype=torch.bool, device="cpu")
    if not torch.is_tensor(modality_mask) or modality_mask.dtype != torch.bool:
        found = getattr(modality_mask, "dtype", type(modality_mask).__name__)
        raise TypeError(f"modality_mask must be a bool tensor (True = present), not {found}")
    if modality_mask.shape != (batch, len(modalities)):
        raise ValueError(
            f"modality_mask must be [{batch}, {len(modalities)}] (samples, {', '.join(modalities)}), "
            f"not {list(modality_mask.shape)}"
        )
    for name, count in batches.items():
        if count != batch:
            raise ValueError(f"the batch holds {batch} samples but {count} rows of {name}")
    missing = [i for i, name in enumerate(modalities) if name not in batches]
    present = modality_mask.clone() if missing else modality_mask
    for i in missing:
        present[:, i] = False
    return present


def _batch(name: str, values: Any) -> int | None:
    """How many samples the inputs of a modality are of; None where there are none.

    A tensor of one row may stand for all samples, as Hugging Face's position_ids do.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"a modality's inputs must be a dictionary of tensors, not {type(values).__name__}")
    counts: dict[int, str] = {}
    for key, value in values.items():
        if torch.is_tensor(value):
            if torch.compiler.is_compiling():  # a graph is for any number of samples, and compares none
                return value.shape[0]
            counts.setdefault(value.shape[0] if value.dim() else 1, key)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            found = f"{key} of {name} must be a tensor, not a {type(value).__name__}"
            raise TypeError(f'{found}: pass return_tensors="pt" to its processor')
    several = [count for count in counts if count != 1] or list(counts)
    if len(several) > 1:
        found = " but ".join(f"{count} rows of {counts[count]}" for count in several)
        raise ValueError(f"the inputs of {name} are {found}: give each sample a row")
    return several[0] if several else None


def refuse_empty(present: Tensor) -> None:
    """ValueError where a sample has nothing. present: bool `[B, M]` on the CPU."""
    anything = present.any(dim=1)
    if not anything.all():
        empty = (~anything).nonzero().flatten().tolist()
        raise ValueError(
            f"samples {empty[:5]} of the batch have every modality absent: drop them, "
            'or build the model with all_absent="prior"'
        )


def check_modalities(names: Iterable[str], modalities: Sequence[str]) -> None:
    unknown = [name for name in names if name not in modalities]
    if unknown:
        raise ValueError(f"unknown modality {unknown[0]!r}: this model has {', '.join(modalities)}")


@dataclass(frozen=True)
class Rows:
    """The b samples of a batch that have one modality.

    Attributes:
        positions: int64 `[b]`, their places in the batch, on the CPU; None in a step of fixed shapes.
        index: the same on the device of the inputs.
        inputs: their rows of every input tensor; other inputs as they are. Empty where the batch has none at all.
        padding_mask: bool `[b, S]` of their tokens on the CPU, where it is known before they are embedded.
    """

    positions: Tensor | None
    index: Tensor
    inputs: dict[str, Any]
    padding_mask: Tensor | None = None

    def embed(self, encoder: Encoder) -> tuple[Tensor, Padding | None]:
        """Tokens `[b, S, D]` and their padding."""
        if not self.inputs:
            return torch.zeros(0, 1, encoder.width, dtype=encoder.dtype, device=self.index.device), None
        tokens, mask = encoder.embed(**self.inputs)
        return tokens, padding_of(mask, self.padding_mask)

    def spread(self, values: Tensor, batch: int, dim: int = 0) -> Tensor:
        """values `[b, ...]` -> `[B, ...]`, zeros for all other samples, which are numbered by `dim`."""
        shape = list(values.shape)
        shape[dim] = batch
        return values.new_zeros(shape).index_copy(dim, self.index, values)


def nobody(device: torch.device) -> Rows:
    """No sample, of a modality that the batch holds no inputs of."""
    nowhere = torch.zeros(0, dtype=torch.long, device="cpu")
    return Rows(nowhere, host.send(nowhere, device), {})


def all_take_part() -> bool:
    """Whether an encoder runs though the batch has no inputs of it, on no rows: other processes may have some.

    DDP waits for a gradient of every parameter, and FSDP2 for every process to collect the shards of a block.
    """
    return distributed.is_available() and distributed.is_initialized()


def present_rows(inputs: Mapping[str, Any], here: Tensor, padding_mask: Tensor | None = None) -> Rows:
    """Those samples of one modality's inputs that are marked in `here`, bool `[B]` on the CPU.

    Where all are, their tensors are taken as they are.
    """
    positions = here.nonzero().flatten()
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    index = host.send(positions, next(iter(tensors.values())).device)
    if len(positions) == len(here):
        return Rows(positions, index, dict(inputs), padding_mask)
    rows = of_samples(inputs, index, len(here))
    return Rows(positions, index, rows, None if padding_mask is None else padding_mask[positions])


def of_samples(inputs: Mapping[str, Any], index: Tensor, batch: int) -> dict[str, Any]:
    """The samples `index` of a modality's inputs; what is one for all `batch` samples stays as it is."""
    return {
        name: value.index_select(0, index)
        if torch.is_tensor(value) and value.dim() and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }
