"""Splits and options that cannot be trained on together are told before anything is written."""

import datasets
import pytest

from u2a_fast.data.labels import label_feature
from u2a_fast.data_checks import numbered_alike

NAMES = ["a", "A", "1"]


def split(labels, names=NAMES, vectors=False, form=None):
    features = datasets.Features({"text": datasets.Value("string"), "label": label_feature(names, vectors)})
    part = datasets.Dataset.from_dict({"text": ["red"] * len(labels), "label": labels}, features)
    return part.to_iterable_dataset() if form == "stream" else part.with_format(form)


@pytest.mark.parametrize("form", [None, "stream", "torch", "numpy"])
@pytest.mark.parametrize(
    ("names", "vectors", "labels", "expected"),
    [
        (["1.0", "A", "a"], False, [0, 1, 2], [2, 1, 0]),
        (["1"], False, [0, 0], [2, 2]),
        (["A", "1", "a"], True, [[1, 0, 0], [0, 1, 1]], [[0, 1, 0], [1, 0, 1]]),
        (["1"], True, [[1], [0]], [[0, 0, 1], [0, 0, 0]]),
        (NAMES, False, [0, 1], [0, 1]),
    ],
)
def test_labels_of_all_splits_are_numbered_by_name(form, names, vectors, labels, expected):
    """Names that differ in their case alone are two, and a number is one however it is written."""
    train = split([[1, 0, 0]] if vectors else [0], vectors=vectors)
    made = numbered_alike("mine", {"train": train, "validation": split(labels, names, vectors, form)})
    assert [row["label"] for row in made["validation"].with_format(None)] == expected
    assert made["validation"].features == train.features


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (split([0], ["zebra", "a"]), "has a class 'zebra', and the train split only a, A, 1: leave its rows out"),
        (split([1.5], None), "has labels for regression, and the train split for classification: give both"),
        (split([[1, 0]], ["a", "A"], vectors=True), "has labels for multi_label, and the train split for"),
    ],
    ids=["class", "numbers", "marks"],
)
@pytest.mark.parametrize("name", ["validation", "test"])
def test_labels_that_the_train_split_does_not_have_are_refused(name, part, message):
    with pytest.raises(ValueError, match=f"the {name} split of mine {message}"):
        numbered_alike("mine", {"train": split([0, 1]), name: part})
