"""Losses in which rare classes count for more, and labels on a scale that a head can learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .methods.base import MultimodalModel
from .methods.label_scale import into_head

Loss = Callable[[Tensor, Tensor], Tensor]


def balanced(model: MultimodalModel, labels: Tensor) -> Loss:
    """A loss for `model.loss` in which every class weighs the same, by the labels of the training split.

    Args:
        labels: `[n]` classes, -100 for none, or `[n, C]` marks. A class's weight is n / (C count); of several labels a
            sample, the weight of a mark is the number of samples without it over that of samples with it.

    Raises:
        ValueError: a regression, which has no classes; a class that the model does not have.
    """
    problem_type, count = model.problem_type(labels.float() if labels.dim() > 1 else labels), len(labels)
    if problem_type == "regression":
        raise ValueError("class_weights need classes, and this is a regression: leave them out")
    if problem_type == "multi_label_classification":
        marks = labels.reshape(count, -1).float().sum(dim=0)
        weights = (count - marks) / marks.clamp(min=1)
        return lambda logits, target: F.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), pos_weight=weights.to(logits)
        )
    model.check_labels(labels, count)
    classes, known = model.config.num_labels, labels[labels != -100].long()
    weights = len(known) / (classes * known.bincount(minlength=classes).clamp(min=1))

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        smoothing = model.label_smoothing if model.training else 0.0
        return F.cross_entropy(logits, target.long(), weight=weights.to(logits), label_smoothing=smoothing)

    return loss


class StandardLabels:
    """A collator whose labels have mean 0 and deviation 1: a head that starts from nothing reaches no price.

    `into_head` puts the scale into a trained model's head, so that it answers in the labels' own units.
    """

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]], labels: Tensor):
        labels = labels.double().reshape(len(labels), -1)
        deviation = labels.std(dim=0, correction=0)
        self.collate = collate
        self.mean, self.deviation = labels.mean(dim=0).float(), torch.where(deviation > 0, deviation, 1).float()

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(samples)
        batch["labels"] = (batch["labels"].reshape(len(samples), -1) - self.mean) / self.deviation
        return batch

    def in_units(self, numbers: Tensor) -> Tensor:
        """Standard labels, or what was predicted of them, `[n, C]`, in the labels' own units."""
        return numbers * self.deviation + self.mean

    @property
    def scale(self) -> dict[str, list[float]]:
        """As a config keeps it."""
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}

    def into_head(self, model: MultimodalModel) -> None:
        into_head(model.head, self.mean, self.deviation)
        model.config.label_scale = None
