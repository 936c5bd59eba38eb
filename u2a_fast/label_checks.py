"""What the labels of a data set's splits cannot teach or measure, said before anything is trained."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from .data.labels import label_names, labels_of
from .methods.config import check_choice
from .metrics import measures, score

logger = logging.getLogger(__name__)

NAMED = 5  # classes in a message


def refuse_labels(data: str, splits: Mapping[str, Any]) -> None:
    """ValueError where there is no label column, where it does not say what its labels mean, or a row has none."""
    for name, part in splits.items():
        if "label" not in part.features:
            found = ", ".join(part.features)
            raise ValueError(
                f"the {name} split of {data} needs a label column of class names, numbers or lists of names; "
                f'it has {found}; where a table calls it otherwise, pass --columns \'{{"label": ".."}}\''
            )
        feature = part.features["label"]
        one = getattr(feature, "feature", feature)  # of a list
        classes, several, dtype = hasattr(one, "names"), one is not feature, str(getattr(one, "dtype", "records"))
        if several if classes else not dtype.startswith("float"):
            kind = ("lists of " if several else "") + ("class numbers" if classes else dtype)
            raise ValueError(
                f"the {name} split of {data} has labels that are {kind}: make classes a "
                "ClassLabel column and what was measured floats; load_table reads lists of names"
            )
        labels = _known_labels(part)
        if not hasattr(part, "__len__") and not labels:
            raise ValueError(f"the {name} split of {data} has no rows: give it some")
        for row, label in enumerate(labels):
            if label is None or (classes and label < 0) or (isinstance(label, list) and None in label):
                raise ValueError(f"the {name} split of {data} has no label in row {row + 1}: leave the row out")
            if not all(map(math.isfinite, label if isinstance(label, list) else [label])):
                told = f"the label {label} in row {row + 1}: fill it in or leave the row out"
                raise ValueError(f"the {name} split of {data} has {told}")


def _known_labels(part: Any) -> Any:
    """The labels of a split as `labels_of` gives them; of a stream the first, since reading on may take hours."""
    if hasattr(part, "__len__"):
        return labels_of(part)
    return [row["label"] for row in part.select_columns(["label"]).with_format(None).take(1)]


def refuse_alike(data: str, train: Any) -> None:
    """ValueError where all rows to train on have one label. Of a stream only the names of its classes are known."""
    feature = train.features["label"]
    if not hasattr(train, "__len__"):
        alike = hasattr(feature, "names") and len(feature.names) < 2
    else:
        alike = len({tuple(label) if isinstance(label, list) else label for label in labels_of(train)}) < 2
    if alike:
        what = "one class only" if hasattr(feature, "names") else "the same label in every row"
        raise ValueError(f"the train split of {data} has {what}: there is nothing to tell apart")


def refuse_unmeasurable(data: str, metric: str, problem_type: str, validation: Any) -> None:
    """ValueError where no model has a value of the metric on the validation split, so that no epoch is the best."""
    feature = validation.features["label"]
    check_choice("metric_for_best", metric, measures(problem_type, len(label_names(feature) or ())))
    if not hasattr(validation, "__len__"):
        return
    labels = torch.tensor(labels_of(validation)[:])
    shape = labels.shape if labels.dim() > 1 else (len(labels), len(label_names(feature) or "1"))
    if math.isnan(score(problem_type, torch.zeros(shape), labels)[metric]):
        raise ValueError(
            f"the validation split of {data} has no {metric}, since the labels of its rows ({len(labels)}) are too "
            "much alike: add others, or choose another --metric-for-best"
        )


def labels_in_words(train: Any) -> str:
    """What the labels of a split are, in a line, by which it is noticed that they were read as those of another task.

    >>> import datasets
    >>> feature = datasets.ClassLabel(names=["blue", "red"])
    >>> labels_in_words(datasets.Dataset.from_dict({"label": [1]}, datasets.Features({"label": feature})))
    'Labels: 2 classes: blue, red.'
    """
    feature = train.features["label"]
    if names := label_names(feature):
        count = f"{len(names)} classes" if hasattr(feature, "names") else f"several of {len(names)} classes a row"
        return f"Labels: {count}: {', '.join(names[:NAMED])}{', ..' if len(names) > NAMED else '.'}"
    numbers = torch.tensor(labels_of(train)[:])
    count = f"{numbers.shape[1]} numbers a row" if numbers.dim() > 1 else "numbers"
    return f"Labels: {count} from {numbers.min():g} to {numbers.max():g}."


def warn_of_classes(data: str, splits: Mapping[str, Any]) -> None:
    """Warn of classes that nobody can learn from these splits: the train split lacks them, or none has two rows."""
    names = getattr(splits["train"].features["label"], "names", None)
    if names is None or not all(hasattr(part, "__len__") for part in splits.values()):
        return
    counts = Counter(labels_of(splits["train"]))
    unknown = [label for label in labels_of(splits["test"]) if label not in counts]
    if counts.total() > len(names) / 2 and max(counts.values()) < 2:
        logger.warning(
            "%s: no two rows of the train split have the same label, %r for one: numbers are written as 1.5, several "
            "labels of a row need --label-separator",
            *(data, names[next(iter(counts))]),
        )
    elif unknown:
        logger.warning(
            "%s: %d of %d rows of the test split are of a class that no row of the train split has, %r for one",
            *(data, len(unknown), len(splits["test"]), names[unknown[0]]),
        )
