"""From rows to a `datasets.DatasetDict`: one seeded split that never separates near-duplicates."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from .labels import label_feature

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MODALITIES = ("image", "text", "audio", "video")
SHARES = {"train": 0.65, "validation": 0.10, "test": 0.25}

Row = dict[str, Any]


def grouped_split(labels: Sequence[Any], groups: Sequence[Hashable], seed: int = 0) -> dict[str, np.ndarray]:
    """The row numbers of train (65%), validation (10%) and test (25%), ascending, each row in exactly one.

    Rows of one group stay together, and every class keeps its share in every split as far as that allows. Labels are
    names or whole numbers (classes), vectors (each mark is a class) or other numbers (only the sizes are kept). The
    same labels, groups and seed always give the same split.

    The groups come in random order, larger ones first, and each goes where its classes are furthest behind; a class
    with too few groups for every split goes only where rows are short.

    Raises:
        ValueError: vectors of different length, or labels and groups that differ in number.

    >>> split = grouped_split(labels=["a", "b"] * 20, groups=range(40))
    >>> {name: len(rows) for name, rows in split.items()}
    {'train': 26, 'validation': 4, 'test': 10}
    """
    classes = _classes_of_rows(labels)
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    if len(classes) != sum(map(len, members.values())):
        raise ValueError(f"there are {len(classes)} labels for {sum(map(len, members.values()))} groups of rows")

    def count(rows: Iterable[int]) -> np.ndarray:
        return np.bincount(np.fromiter(chain.from_iterable(classes[row] for row in rows), int), minlength=size)

    shares = np.array(list(SHARES.values()))
    blocks = list(members.values())
    size = 1 + max(map(max, classes), default=-1)
    totals = count(range(len(classes)))
    scarce = sum((count(block) > 0 for block in blocks), np.zeros(size)) < 0.5 / shares.min()
    target = np.outer(shares, np.maximum(totals, 1))
    placed = np.zeros_like(target)
    rows: list[list[int]] = [[] for _ in SHARES]
    # Ranks from raw bits instead of `permutation`: NumPy promises that the former never change.
    shuffled = np.argsort(np.random.PCG64(seed).random_raw(len(members)), kind="stable")
    for block in sorted((blocks[index] for index in shuffled), key=len, reverse=True):
        added = count(block)
        behind = (added * (target - placed - added / 2) / target).sum(axis=1)
        if added[scarce].any():
            # By its classes alone it would never go to validation, where less than half a group of them is due.
            short = shares * len(classes) - [len(part) for part in rows]
            behind[short < min(len(block) / 2, short.max())] = -np.inf
        chosen = int(behind.argmax())
        placed[chosen] += added
        rows[chosen].extend(block)
    return {name: np.array(sorted(part), dtype=np.int64) for name, part in zip(SHARES, rows, strict=True)}


def _classes_of_rows(labels: Sequence[Any]) -> Any:
    """The classes that each row counts for: its own one, or the marks of its vector and one that all rows share."""
    try:
        values = np.asarray(labels)
    except ValueError as error:
        raise ValueError(
            "the labels differ in length; make all of them vectors of one length, and lists of names vectors of 0 and 1"
        ) from error
    if values.ndim > 1:
        return [np.flatnonzero([1, *vector]) for vector in values]
    if values.dtype.kind == "f":
        return np.zeros((len(values), 1), int)
    return np.unique(values.astype(str), return_inverse=True)[1][:, None]


def split_rows(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Rows split by their "label" and "group"; a row without a group is a group of its own."""
    labels = [row.get("label") for row in rows]
    groups = [index if row.get("group") is None else row["group"] for index, row in enumerate(rows)]
    return {name: [rows[index] for index in part] for name, part in grouped_split(labels, groups, seed).items()}


def warn_of_leaks(splits: Mapping[str, Sequence[Row]], source: str) -> None:
    """Warn of rows to test whose group, picture, recording or video is that of a row to train on."""
    learnt = [row for name in ("train", "validation") for row in splits.get(name, ())]
    for column in ("group", "image", "audio", "video"):
        known = {content for row in learnt if (content := _content(row.get(column))) is not None}
        shared = sum(_content(row.get(column)) in known for row in splits.get("test", ()))
        if shared:
            logger.warning(
                "%s: %d of %d rows to test have the %s of a row to train on, which makes their scores too good: give "
                "such rows one `group`, and no `split`",
                *(source, shared, len(splits["test"]), column),
            )


def _content(cell: Any) -> Hashable:
    return (cell["path"], cell["bytes"]) if isinstance(cell, Mapping) else cell


def make_dataset(splits: dict[str, list[Row]], class_names: Sequence[str] | None) -> datasets.DatasetDict:
    """The data set of `splits`; the columns of a split are the keys of its rows.

    Images, recordings and videos are stored as {"path", "bytes"} and not decoded, so that a broken file reaches the
    collator as an absent modality instead of ending an epoch. With `class_names` a label is one of them, and becomes a
    ClassLabel, or a vector with a mark for each; without, it is a number or a list of numbers.
    """
    import datasets

    rows = [row for part in splits.values() for row in part]
    vectors = any(isinstance(row.get("label"), list) for row in rows)
    # Files go in as plain records and are cast afterwards: encoding an Audio column asks for torchcodec.
    record = {"path": datasets.Value("string"), "bytes": datasets.Value("binary")}
    features = {
        "image": record,
        "text": datasets.Value("string"),
        "audio": record,
        "video": record,
        "label": label_feature(class_names, vectors),
        "group": datasets.Value("string"),
    }

    made = {}
    for name, part in splits.items():
        given = {key for row in part or rows for key in row}
        columns = [column for column in features if column in given]
        made[name] = datasets.Dataset.from_dict(
            {column: [row.get(column) for row in part] for column in columns},
            features=datasets.Features({column: features[column] for column in columns}),
        )
        for column, feature in {"image": datasets.Image, "audio": datasets.Audio, "video": datasets.Video}.items():
            if column in columns:
                made[name] = made[name].cast_column(column, feature(decode=False))
    return datasets.DatasetDict(made)


def file_cell(path: Any) -> dict[str, Any] | None:
    """The stored form of an image or recording at `path`; None stays None."""
    return None if path is None else {"path": str(path), "bytes": None}
