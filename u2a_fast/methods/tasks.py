"""What labels mean to a model, which of them fit it, and the loss of its task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import host


class Tasks(nn.Module):
    """Part of `MultimodalModel`."""

    config: Any
    label_smoothing: float

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss" and not isinstance(value, nn.Module):
            self._modules.pop("loss", None)  # or nn.Module keeps the one that was set before
        super().__setattr__(name, value)

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem_type(labels) == "regression":
            wide = torch.promote_types(logits.dtype, torch.float32)  # bf16 rounds a price, fp16 has none above 65504
            return F.mse_loss(logits.to(wide), labels.view_as(logits).to(wide))
        if self.problem_type(labels) == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing if self.training else 0.0)

    def problem_type(self, labels: Tensor | None) -> str:
        """The config's problem type, or what labels of this dtype stand for, as in Hugging Face's classifiers.

        Without labels, whole numbers are assumed.
        """
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        marks = labels is not None and labels.is_floating_point()
        return "multi_label_classification" if marks else "single_label_classification"

    def check_labels(self, labels: Tensor, batch: int) -> None:
        """Refuse labels that do not fit `batch` samples and, on the CPU, the classes of this model; -100: no label."""
        count = self.config.num_labels
        if not torch.is_tensor(labels) or labels.dim() == 0:
            raise TypeError(f"labels must be a tensor of {batch} rows, not {labels!r}")
        if labels.shape[0] != batch:
            raise ValueError(f"{labels.shape[0]} labels were given for {batch} samples")
        if self.problem_type(labels) != "single_label_classification":
            if labels.numel() != batch * count:
                raise ValueError(f"labels must be [{batch}, {count}], not {list(labels.shape)}")
            if self.problem_type(labels) == "multi_label_classification" and host.readable(labels):
                check_marks(labels)
            return
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be [{batch}] class indices, not {list(labels.shape)} of {labels.dtype}")
        if not host.readable(labels):
            return
        if batch == 0 or (labels.min() >= 0 and labels.max() < count):  # nearly always, at a fraction of what follows
            return
        outside = labels[(labels < 0) & (labels != -100) | (labels >= count)]
        if outside.numel():
            raise ValueError(f"label {outside[0].item()} is out of range: num_labels={count} allows 0 to {count - 1}")


def check_marks(labels: Tensor) -> None:
    """ValueError where labels of several classes are no marks; shares between 0 and 1 are."""
    strange = labels[~((labels >= 0) & (labels <= 1))]
    if strange.numel():
        raise ValueError(
            f"labels of several classes are marks from 0 to 1, not {strange[0].item()}: for numbers build the model "
            'with problem_type="regression"'
        )
