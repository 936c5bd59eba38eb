"""What of data and options cannot be trained on, refused before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .data.labels import task_of
from .label_checks import refuse_alike, refuse_labels, refuse_unmeasurable
from .methods.config import check_choice
from .options import BESIDES, TrainOptions, check_splits

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def check_data(options: TrainOptions, splits: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse before training what would fail, or mean nothing, after it."""
    check_choice("dtype", options.dtype, DTYPES)
    check_choice("all_absent", options.all_absent, ("error", "prior"))
    check_choice("class_weights", options.class_weights, (None, "balanced"))
    needed = ("train", "test", *(["validation"] if options.metric_for_best else []))
    check_splits(options.data, splits, needed)
    for name in needed:
        if hasattr(splits[name], "__len__") and not len(splits[name]):
            raise ValueError(f"the {name} split of {options.data} has no rows: add some, or split the rows otherwise")
    refuse_labels(options.data, splits)
    train = splits["train"]
    feature = train.features["label"]
    refuse_alike(options.data, train)
    if options.metric_for_best:
        problem_type = PROBLEM_TYPES[str(task_of(feature))]
        refuse_unmeasurable(options.data, options.metric_for_best, problem_type, splits["validation"])
    if not hasattr(train, "__len__"):
        check_stream(options, sources, str(task_of(feature)))
    columns = [name for name in train.features if name not in BESIDES]
    for name in sources:
        if name not in columns:
            raise ValueError(
                f"--encoders has an unknown modality {name!r}: {options.data} has {', '.join(columns)}; leave it out, "
                "or name its column in --columns"
            )


def check_stream(options: TrainOptions, sources: Mapping[str, str], task: str) -> None:
    """Refuse to train on a stream what needs all rows at once."""
    if options.max_steps < 1 or options.baselines or options.class_weights:
        raise ValueError("a stream has no length: set max_steps, and leave baselines and class_weights out")
    if task == "regression":
        raise ValueError(
            f"the labels of {options.data} are numbers, whose scale a stream does not tell: load it as a whole"
        )
    if len(sources) < 2:
        raise ValueError(
            f"{options.data} is a stream with one modality, and holes are drawn for two: load it as a whole"
        )
