import numpy as np
import pytest

from u2a_fast.data.splits import SHARES, grouped_split, make_dataset, split_rows


def random_data(seed, n=2000, classes=6, groups=900):
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, n, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    # A group belongs to one class, as near-duplicates do.
    numbers = generator.integers(0, groups // classes, n)
    return labels, [f"{label}-{number}" for label, number in zip(labels, numbers, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_in_exactly_one_split(seed):
    split = grouped_split(*random_data(seed), seed)
    assert list(split) == ["train", "validation", "test"]
    assert sorted(np.concatenate(list(split.values()))) == list(range(2000))


@pytest.mark.parametrize("seed", range(3))
def test_groups_never_cross_splits(seed):
    labels, groups = random_data(seed)
    parts = [{groups[row] for row in rows} for rows in grouped_split(labels, groups, seed).values()]
    assert sum(map(len, parts)) == len(set(groups))


@pytest.mark.parametrize("seed", range(3))
def test_sizes_and_classes_keep_their_shares(seed):
    labels, groups = random_data(seed)
    for name, rows in grouped_split(labels, groups, seed).items():
        assert len(rows) == pytest.approx(SHARES[name] * len(labels), rel=0.05)
        for label in range(6):
            share = (labels[rows] == label).sum() / (labels == label).sum()
            assert share == pytest.approx(SHARES[name], abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_one_large_group_does_not_upset_the_sizes(seed):
    """Placed last, after the small ones have filled every split, it could only overflow one."""
    split = grouped_split(["a"] * 100, [*range(60), *["large"] * 40], seed)
    assert {name: len(rows) for name, rows in split.items()} == {"train": 65, "validation": 10, "test": 25}


def test_the_seed_fixes_the_split_and_another_one_changes_it():
    labels, groups = random_data(0)
    first, again, other = (grouped_split(labels, groups, seed)["test"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_split_of_a_seed_stays_the_same_over_versions():
    assert grouped_split(list("aabbccddee") * 4, range(40), seed=0)["test"].tolist() == [
        4,
        13,
        17,
        20,
        27,
        30,
        33,
        35,
        38,
        39,
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows_per_group", [1, 6])
def test_classes_too_small_to_divide_starve_no_split(size, rows_per_group):
    count = 300 * rows_per_group
    labels = [f"class {row // (size * rows_per_group)}" for row in range(count)]
    for name, rows in grouped_split(labels, [row // rows_per_group for row in range(count)]).items():
        assert len(rows) == pytest.approx(SHARES[name] * count, rel=0.05)


def test_of_two_rows_of_a_class_one_is_trained_on_where_possible():
    labels = [f"class {row // 2}" for row in range(100)]
    assert len({labels[row] for row in grouped_split(labels, range(100))["train"]}) >= 45


@pytest.mark.parametrize("whole", [False, True], ids=["all different", "some whole"])
def test_labels_that_are_measurements_are_not_classes(whole):
    labels = [row if whole and row % 2 else row / 7 for row in range(100)]
    split = grouped_split(labels, range(100))
    assert {name: len(rows) for name, rows in split.items()} == {"train": 65, "validation": 10, "test": 25}


@pytest.mark.parametrize("share", [0, 0.05, 0.5])
def test_the_marks_of_label_vectors_keep_their_shares(share):
    labels = np.random.default_rng(0).random((400, 8)) < share
    for name, rows in grouped_split(labels.tolist(), range(400)).items():
        assert len(rows) == pytest.approx(SHARES[name] * 400, abs=3)
        np.testing.assert_allclose(labels[rows].sum(0), SHARES[name] * labels.sum(0), atol=3)


def test_label_vectors_of_different_length_are_refused():
    with pytest.raises(ValueError, match="labels differ in length"):
        grouped_split([[0, 1], [1]], range(2))


def test_labels_and_groups_of_different_length_are_refused():
    with pytest.raises(ValueError, match="3 labels for 2"):
        grouped_split(["a", "b", "c"], [1, 2])


def test_rows_without_a_group_stand_alone():
    parts = split_rows([{"label": "a", "group": None} for _ in range(100)], seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 65, "validation": 10, "test": 25}


def test_files_are_stored_as_records_and_holes_as_none():
    record = {"path": "/x/a.ogg", "bytes": None}
    rows = [{"audio": record, "text": "a", "label": "b"}, {"audio": None, "text": None, "label": "a"}]
    made = make_dataset({"train": rows, "test": []}, ["a", "b"])
    assert made["train"][0] == {"audio": record, "text": "a", "label": 1}
    assert made["train"][1] == {"audio": None, "text": None, "label": 0}
    assert made["test"].features == made["train"].features


def test_a_column_of_holes_alone_keeps_its_type():
    made = make_dataset({"train": [{"image": None, "text": None}]}, None)
    assert type(made["train"].features["image"]).__name__ == "Image"
    assert made["train"].features["text"].dtype == "string"
