"""Labels that teach or measure nothing are refused or named before anything is trained."""

import datasets
import pytest

from u2a_fast.data.labels import label_feature
from u2a_fast.label_checks import refuse_alike, refuse_unmeasurable, warn_of_classes

TASKS = {"classes": "single_label_classification", "marks": "multi_label_classification", "numbers": "regression"}
FEATURES = {
    "classes": label_feature(["a", "b"], False),
    "many": label_feature(list("abcd"), False),
    "marks": label_feature(["a", "b"], True),
    "numbers": label_feature(None, False),
}


def split(kind, labels):
    return datasets.Dataset.from_dict({"label": labels}, datasets.Features({"label": FEATURES[kind]}))


@pytest.mark.parametrize(
    ("kind", "alike", "unlike"),
    [("classes", [1, 1], [1, 0]), ("numbers", [1.5, 1.5], [1.5, 2]), ("marks", [[0, 1]] * 2, [[0, 1], [1, 1]])],
)
def test_one_label_for_all_rows_teaches_nothing(kind, alike, unlike):
    refuse_alike("t.csv", split(kind, unlike))
    with pytest.raises(ValueError, match=r"the train split of t\.csv has .*: there is nothing to tell apart"):
        refuse_alike("t.csv", split(kind, alike))


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


def test_classes_that_the_train_split_lacks_are_named(caplog):
    warn_of_classes("t.csv", {"train": split("many", [0, 0, 1, 1]), "test": split("many", [0, 1])})
    warn_of_classes("t.csv", {"train": split("numbers", [0.5, 1.5]), "test": split("numbers", [3.5])})
    assert not caplog.text
    warn_of_classes("t.csv", {"train": split("many", [0, 0, 1, 1]), "test": split("many", [0, 3, 3])})
    assert "2 of 3 rows of the test split are of a class that no row of the train split has, 'd'" in caplog.text
    caplog.clear()
    warn_of_classes("t.csv", {"train": split("many", [2, 1, 0]), "test": split("many", [3])})
    assert "no two rows of the train split have the same label, 'c' for one" in caplog.text
