"""What decides which kernels run stays on the CPU too: a step that reads it there waits for no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class HostCopies:
    """A collator whose batches hold masks, labels and other whole numbers twice, once as arrays under "on_host".

    Trainer and accelerate move tensors to the GPU and leave arrays where they are; the models read the arrays. What
    changes one after collating has to change the other, or drop "on_host".

    >>> batch = HostCopies(lambda samples: {"modality_mask": torch.ones(1, 2, dtype=torch.bool)})([])
    >>> batch["on_host"]
    {'modality_mask': array([[ True,  True]])}
    """

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(samples)
        return {**batch, "on_host": _arrays(batch, besides=("labels",))}


def _arrays(batch: Mapping[str, Any], besides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Views of the tensors of whole numbers, and of those named; pixels and samples decide nothing."""
    found = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            found[name] = _arrays(value)
        elif torch.is_tensor(value) and (name in besides or not value.is_floating_point()):
            found[name] = value.numpy()
    return found
