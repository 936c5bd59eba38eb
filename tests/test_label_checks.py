"""Labels that teach or measure nothing are refused or named before anything is trained."""

import datasets
import pytest

from u2a_fast.data.labels import label_feature, label_names
from u2a_fast.label_checks import (
    labels_in_words,
    refuse_alike,
    refuse_labels,
    refuse_unmeasurable,
    warn_of_classes,
)

TASKS = {"classes": "single_label_classification", "marks": "multi_label_classification", "numbers": "regression"}
FEATURES = {
    "classes": label_feature(["a", "b"], False),
    "many": label_feature(list("abcd"), False),
    "marks": label_feature(["a", "b"], True),
    "numbers": label_feature(None, False),
}


def split(kind, labels):
    return datasets.Dataset.from_dict({"label": labels}, datasets.Features({"label": FEATURES[kind]}))


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize(
    ("kind", "alike", "unlike"),
    [("classes", [1, 1], [1, 0]), ("numbers", [1.5, 1.5], [1.5, 2]), ("marks", [[0, 1]] * 2, [[0, 1], [1, 1]])],
)
def test_one_label_for_all_rows_teaches_nothing(kind, alike, unlike, form):
    refuse_alike("t.csv", split(kind, unlike).with_format(form))
    with pytest.raises(ValueError, match=r"the train split of t\.csv has .*: there is nothing to tell apart"):
        refuse_alike("t.csv", split(kind, alike).with_format(form))


@pytest.mark.parametrize(
    ("kind", "metric", "without", "measured"),
    [("classes", "auroc", [1, 1, 1], [1, 0, 1]), ("numbers", "r2", [2.5], [2.5, 3]),
     ("numbers", "r2", [2.5, 2.5], [2.5, 3]), ("marks", "map", [[0, 0]], [[0, 1]])],
)  # fmt: skip
def test_a_metric_needs_rows_that_it_can_be_measured_on(kind, metric, without, measured):
    refuse_unmeasurable("t.csv", metric, TASKS[kind], split(kind, measured))
    with pytest.raises(ValueError, match=rf"the validation split of t\.csv has no {metric}"):
        refuse_unmeasurable("t.csv", metric, TASKS[kind], split(kind, without))
    with pytest.raises(ValueError, match="metric_for_best must be one of"):
        refuse_unmeasurable("t.csv", "loss", TASKS[kind], split(kind, measured))


@pytest.mark.parametrize(
    ("feature", "labels", "said"),
    [
        (label_feature(["a", "b"], False), [0, 1], "Labels: 2 classes: a, b."),
        (label_feature(list("abcdefg"), False), [0, 1], "Labels: 7 classes: a, b, c, d, e, .."),
        (label_feature(["a", "b"], True), [[0, 1]], "Labels: several of 2 classes a row: a, b."),
        (label_feature(None, False), [4, 0.5], "Labels: numbers from 0.5 to 4."),
        (label_feature(None, True), [[4, 0], [-1, 3]], "Labels: 2 numbers a row from -1 to 4."),
    ],
)
def test_a_line_says_as_what_the_labels_were_read(feature, labels, said):
    part = datasets.Dataset.from_dict({"label": labels}, datasets.Features({"label": feature}))
    assert labels_in_words(part) == labels_in_words(part.with_format("torch")) == said
    if label_names(feature):
        assert labels_in_words(part.to_iterable_dataset()) == said


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_classes_that_the_train_split_lacks_are_named(form, caplog):
    known = {"train": split("many", [0, 0, 1, 1]), "test": split("many", [0, 1])}
    warn_of_classes("t.csv", {name: part.with_format(form) for name, part in known.items()})
    warn_of_classes("t.csv", {"train": split("numbers", [0.5, 1.5]), "test": split("numbers", [3.5])})
    assert not caplog.text
    warn_of_classes("t.csv", {"train": split("many", [0, 0, 1, 1]), "test": split("many", [0, 3, 3])})
    assert "2 of 3 rows of the test split are of a class that no row of the train split has, 'd'" in caplog.text
    caplog.clear()
    warn_of_classes("t.csv", {"train": split("many", [2, 1, 0]), "test": split("many", [3])})
    assert "no two rows of the train split have the same label, 'c' for one" in caplog.text


@pytest.mark.parametrize("form", [None, "torch"])
@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (datasets.Value("string"), ["a", "b"], "are string: make classes a ClassLabel column"),
        (datasets.Value("int64"), [0, 1], "are int64"),
        (datasets.Value("bool"), [True, False], "are bool"),
        (datasets.List(datasets.ClassLabel(names=["a", "b"])), [[0], [1]], "are lists of class numbers"),
        (datasets.List(datasets.Value("int64")), [[0, 1], [1, 0]], "are lists of int64"),
        (datasets.ClassLabel(names=["a", "b"]), [0, -1], "has no label in row 2"),
        (datasets.ClassLabel(names=["a", "b"]), [None, 1], "has no label in row 1"),
        (datasets.Value("float64"), [-1.0, None], "has no label in row 2"),
        (datasets.List(datasets.Value("float32")), [[0.0, None]], "has no label in row 1"),
        (datasets.Value("float32"), [1.0, float("nan")], "has the label nan in row 2: fill it in or leave the row out"),
        (datasets.List(datasets.Value("float32")), [[0.0, float("inf")]], r"has the label \[0\.0, inf\] in row 1"),
    ],
)
def test_labels_that_do_not_say_what_they_mean_are_refused(feature, labels, message, form):
    part = datasets.Dataset.from_dict({"label": labels}, datasets.Features({"label": feature})).with_format(form)
    with pytest.raises(ValueError, match=rf"the test split of my data has .*{message}|split of my data {message}"):
        refuse_labels("my data", {"test": part})


def test_the_first_row_of_a_stream_is_looked_at():
    empty = datasets.IterableDataset.from_generator(lambda: iter(()), features=split("many", [0]).features)
    unlabelled = split("many", [-1, 0]).to_iterable_dataset()
    for stream, message in ((unlabelled, "no label in row 1"), (empty, "split of my data has no rows")):
        with pytest.raises(ValueError, match=message):
            refuse_labels("my data", {"train": stream})
    refuse_labels("my data", {"train": split("many", [0, -1]).to_iterable_dataset().with_format("torch")})


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("kind", list(FEATURES))
def test_labels_as_tables_have_them_are_taken(kind, form):
    labels = [[0.0, 1.0]] * 2 if kind == "marks" else [-1.5, -1.0] if kind == "numbers" else [0, 1]
    refuse_labels("my data", {"train": split(kind, labels).with_format(form)})
