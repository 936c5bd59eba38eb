"""Splits and options that cannot be trained on together are told before anything is written."""

from dataclasses import replace

import datasets
import pytest

from u2a_fast.data.labels import label_feature
from u2a_fast.data_checks import numbered_alike, warn_of_holes
from u2a_fast.options import TrainOptions

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


@pytest.mark.parametrize(
    ("asked", "rate", "modalities", "said"),
    [
        ({"missing_rate": 0.7}, 0.7, ["text"], "take nothing away where text is the only modality"),
        ({"missing_kind": "image"}, 0.7, ["text"], "take nothing away where text is the only modality"),
        ({"missing_kind": "text"}, 0.0, ["text", "image"], "take nothing away without a --missing-rate above 0"),
        ({"missing_kind": "text"}, 0.7, ["text", "image"], ""),
        ({}, 0.7, ["text"], ""),  # of the data's own recipe
        ({"missing_rate": 0.0}, 0.0, ["text"], ""),
    ],
)
def test_holes_that_are_asked_for_and_not_made_are_told(asked, rate, modalities, said, caplog):
    options = TrainOptions(**asked)
    warn_of_holes(options, replace(options, missing_rate=rate), dict.fromkeys(modalities, "folder"))
    assert said in caplog.text and bool(said) == bool(caplog.text)
