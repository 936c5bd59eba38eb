"""What the three reference methods share: presence, the task loss, the output."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

Inputs = dict[str, dict[str, Tensor]]  # {modality: keyword arguments of its encoder}


@dataclass
class ReferenceOutput:
    """loss = task_loss + weight * align_loss; the losses are None without labels, align_loss is where there is none."""

    logits: Tensor  # [B, C]
    loss: Tensor | None = None
    task_loss: Tensor | None = None
    align_loss: Tensor | None = None  # JointEmbedding: VICReg


def presence(inputs: Inputs, modalities: list[str], modality_mask: Tensor | None) -> Tensor:
    """bool [B, M], True = present. A modality without inputs is absent; without a mask the others are all present."""
    first = next(iter(next(iter(inputs.values())).values()))
    given = torch.tensor([m in inputs for m in modalities], device=first.device).expand(len(first), -1)
    return given if modality_mask is None else given & modality_mask


def require_one_modality(present: Tensor) -> None:
    if not present.any(dim=1).all():
        raise ValueError("a sample has no modality at all")


def take(inputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The samples `rows` [n] of one modality's inputs; the others are never read."""
    return {name: value[rows] for name, value in inputs.items()}


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(dim=0)


def task_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """Hugging Face's rule where `problem_type` is None: one output: regression; integers: single label; else multi."""
    if problem_type is None:
        is_single = not torch.is_floating_point(labels)
        problem_type = "single_label_classification" if is_single else "multi_label_classification"
        problem_type = "regression" if logits.shape[1] == 1 else problem_type
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels)
    labels = labels.to(logits.dtype).view_as(logits)
    loss = mse_loss if problem_type == "regression" else binary_cross_entropy_with_logits
    return loss(logits, labels)
