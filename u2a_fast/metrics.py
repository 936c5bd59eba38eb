"""What the answers of a model are worth, in the measures that people of each task use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import functional as F

NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "map": "mAP",
    "auroc": "AUROC",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R2",
}
UNBOUNDED = ("mae", "rmse")  # in the labels' own units; less is better
NAN = float("nan")
NOT_FINITE = "take the encoders in another dtype, or train again with a lower learning rate"  # logits, and what helps

Scores = dict[str, float]


def refuse_not_finite(what: str, values: Tensor, cure: str) -> None:
    """ValueError where one of the values is NaN or infinite: every number made of it would be one of nothing."""
    if not values.isfinite().all():
        raise ValueError(f"{what} hold values that are not finite: {cure}")


def score(problem_type: str, logits: Tensor, labels: Tensor) -> Scores:
    """The task's measures, and under `majority` the first of them for the best answer that never looks at a sample.

    Args:
        problem_type: single_label_classification, multi_label_classification or regression.
        logits: `[n, C]`.
        labels: `[n]` classes, or `[n, C]` marks or numbers (`[n]` where C is 1).

    >>> score("regression", torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 2.0]))
    {'mae': 1.0, 'rmse': 1.0, 'r2': 0.0, 'majority': 0.0}
    """
    logits = logits.double()  # squares of labels far from 0 (years, seconds since 1970) have no digits left in fp32
    measure = {
        "single_label_classification": _classification,
        "multi_label_classification": _multi_label,
        "regression": _regression,
    }[problem_type]
    if not len(labels):
        return dict.fromkeys((*measures(problem_type, logits.shape[1]), "majority"), NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes without a sample, which the means leave out
        return {name: float(value) for name, value in measure(logits, labels).items()}


def measures(problem_type: str, classes: int) -> tuple[str, ...]:
    """The names of the task's measures, in the order of a report's columns."""
    if problem_type == "regression":
        return ("mae", "rmse", "r2")
    if problem_type == "multi_label_classification":
        return ("micro_f1", "macro_f1", "map", "accuracy")
    return ("accuracy", "macro_f1", "auroc") if classes == 2 else ("accuracy", "macro_f1")


def written(name: str, value: float, places: int) -> str:
    """A measure as a report shows it: to so many places, and errors in small units to so many digits.

    >>> written("accuracy", 0.66666, 3), written("mae", 0.66666, 3), written("mae", 0.000012345, 3)
    ('0.667', '0.667', '1.23e-05')
    """
    small = name in UNBOUNDED and 0 < value < 10.0 ** (1 - places)
    return f"{value:.{places}g}" if small else f"{value:.{places}f}"


def headline(row: Mapping[str, Any]) -> str:
    """The measure of a report's row that plots draw and comparisons rank by: more is better in all of them."""
    if "r2" in row:
        return "r2"
    return "accuracy" if "accuracy" in row and "map" not in row else "macro_f1"


def _classification(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    task = {"task": "multiclass", "num_classes": logits.shape[1]}
    predicted = logits.argmax(dim=1)
    values = {
        "accuracy": F.accuracy(predicted, labels, average="micro", **task),
        "macro_f1": F.f1_score(predicted, labels, average="macro", **task),
    }
    if logits.shape[1] == 2:
        both = len(labels.unique()) == 2
        values["auroc"] = F.auroc(_ranks(logits[:, 1] - logits[:, 0]), labels, task="binary") if both else NAN
    return {**values, "majority": labels.bincount().max() / len(labels)}


def _multi_label(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    said, true, ranks = logits.sigmoid() > 0.5, labels.view_as(logits) > 0.5, _ranks(logits)
    found = true.any(dim=0).nonzero().flatten().tolist()  # a class without a sample has no precision
    precisions = [F.average_precision(ranks[:, i], true[:, i].int(), task="binary") for i in found]
    return {
        "micro_f1": _f1(said.flatten(), true.flatten()),
        "macro_f1": _f1(said, true).mean(),
        "map": torch.stack(precisions).mean() if precisions else NAN,
        "accuracy": (said == true).double().mean(),
        "majority": _f1(torch.ones_like(said), true).mean(),
    }


def _f1(said: Tensor, true: Tensor) -> Tensor:
    """F1 over the first axis of two bool tensors; 0 where neither has a mark."""
    hits, marks = (said & true).sum(dim=0), said.sum(dim=0) + true.sum(dim=0)
    return 2 * hits / marks.clamp(min=1).double()


def _regression(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    labels = labels.view_as(logits).double()
    # Not torchmetrics' R2, to which sums of squares below 1e-4 are nothing.
    left, spread = (labels - logits).square().sum(dim=0), (labels - labels.mean(dim=0)).square().sum(dim=0)
    return {
        "mae": F.mean_absolute_error(logits.contiguous(), labels),
        "rmse": F.mean_squared_error(logits.contiguous(), labels, squared=False),
        "r2": torch.where((labels != labels[:1]).any(dim=0), 1 - left / spread, NAN).nanmean(),
        "majority": 0.0,  # the mean of the labels
    }


def _ranks(logits: Tensor) -> Tensor:
    """Numbers in 0..1 in the order of the logits, all of whose differences they keep; a sigmoid ends at 1."""
    return logits.unique(return_inverse=True)[1].double() / logits.numel()
