"""What of data and options cannot be trained on, refused before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .data.classes import Classes
from .data.labels import label_names, task_of
from .data.presence import readable
from .label_checks import refuse_alike, refuse_labels, refuse_unmeasurable
from .methods.config import check_choice
from .options import BESIDES, TrainOptions, check_splits

logger = logging.getLogger(__name__)

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
        refuse_unreadable(options.data, splits["validation"], sources)
    elif "validation" in splits and hasattr(train, "__len__") and not hasattr(splits["validation"], "__len__"):
        raise ValueError(
            f"the validation split of {options.data} is a stream and the train split is none, so they cannot be joined "
            "to train on: load both as a whole, or leave it out"
        )
    if not hasattr(train, "__len__"):
        check_stream(options, sources, str(task_of(feature)))
    columns = [name for name in train.features if name not in BESIDES]
    for name in sources:
        if name not in columns:
            raise ValueError(
                f"--encoders has an unknown modality {name!r}: {options.data} has {', '.join(columns)}; leave it out, "
                "or name its column in --columns"
            )


def warn_of_holes(options: TrainOptions, chosen: TrainOptions, sources: Mapping[str, str]) -> None:
    """Warn where holes were asked for and none are made."""
    why = f"where {min(sources)} is the only modality" if len(sources) == 1 else "without a --missing-rate above 0"
    if (options.missing_rate or options.missing_kind != "both") and (len(sources) == 1 or not chosen.missing_rate):
        logger.warning("--missing-rate and --missing-kind take nothing away %s", why)


def numbered_alike(data: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    """Splits that were made apart, with the labels of each numbered as the train split's, by name.

    Raises:
        ValueError: labels of another kind than the train split's, or a class that it does not name.
    """
    refuse_labels(data, splits)
    feature, made = splits["train"].features["label"], {}
    names, task = label_names(feature), task_of(feature)
    for split, part in splits.items():
        own = part.features["label"]
        if task_of(own) != task:
            raise ValueError(
                f"the {split} split of {data} has labels for {task_of(own)}, and the train split for {task}: give both "
                "labels of one kind"
            )
        made[split] = part if label_names(own) == names else _renumbered(data, split, part, feature)
    return made


def _renumbered(data: str, split: str, part: Any, feature: Any) -> Any:
    from datasets import Features

    names = label_names(feature) or []
    known, own = Classes(names), label_names(part.features["label"]) or []
    numbers = [known.find(name) for name in own]
    if None in numbers:
        raise ValueError(
            f"the {split} split of {data} has a class {own[numbers.index(None)]!r}, and the train split only "
            f"{', '.join(names)}: leave its rows out, or name it in the train split too"
        )

    def renumbered(label: Any) -> dict[str, Any]:
        label = label.tolist() if hasattr(label, "tolist") else label  # under a format of the split
        if isinstance(label, list):
            marks = dict(zip(numbers, label, strict=True))
            return {"label": [marks.get(i, 0.0) for i in range(len(names))]}
        return {"label": numbers[label] if label in range(len(numbers)) else label}

    return part.map(renumbered, input_columns="label", features=Features({**part.features, "label": feature}))


def refuse_unreadable(data: str, validation: Any, sources: Mapping[str, str]) -> None:
    """ValueError where no row of the validation split has anything to measure a model of these modalities by."""
    if not hasattr(validation, "__len__"):
        return
    names = [name for name in sources if name in validation.column_names]
    if not names or not readable(validation, names, decode=False).any():
        raise ValueError(
            f"the validation split of {data} has no row with {' or '.join(sources)}, by which --metric-for-best could "
            "be measured: add some, or leave the option out"
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
