"""Which files of a folder are the splits of a data set, and which of them nobody reads."""

import logging

import pytest
from PIL import Image
from tables import json_lines, parquet, write

from u2a_fast.data import load_table
from u2a_fast.data.labels import label_names
from u2a_fast.data.table_files import find_tables


@pytest.mark.parametrize("name", ["val", "dev", "valid", "validation", "Val", "DEV"])
def test_a_validation_split_has_many_names(tmp_path, name):
    for stem in ("train", name, "test"):
        write(tmp_path, f"{stem}.csv")
    assert list(load_table(tmp_path)) == ["train", "validation", "test"]
    write(tmp_path, "validation.jsonl", json_lines({"text": "a", "label": "x"}))
    with pytest.raises(ValueError, match="holds 2 tables for validation"):
        load_table(tmp_path)


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("Train", "TESTING")])
def test_splits_to_train_and_to_test_have_two_names_each(tmp_path, train, test):
    for stem in (train, test):
        write(tmp_path, f"{stem}.csv")
    assert list(load_table(tmp_path)) == ["train", "test"]
    both = write(tmp_path, "all/t.csv", f"text,label,split\na,x,{train}\nb,y,{test}\n")
    assert list(load_table(both)) == ["train", "test"]


def test_a_table_that_is_no_split_is_not_ignored_in_silence(tmp_path, caplog):
    for stem in ("train", "test", "extra"):
        write(tmp_path, f"{stem}.csv")
    with caplog.at_level(logging.WARNING):
        load_table(tmp_path)
    assert "not read, since no split has that name: extra.csv" in caplog.text
    for name in ("more.csv", "validation.json", "Dev.csv.gz", "notes.txt"):
        write(tmp_path, name)
    with caplog.at_level(logging.WARNING):
        load_table(tmp_path)
    assert "no split has that name: extra.csv, more.csv" in caplog.text
    assert "not read, since tables end in .csv, .tsv, .jsonl, .parquet: Dev.csv.gz, validation.json" in caplog.text
    for name in ("train", "test", "extra", "more"):
        (tmp_path / f"{name}.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"0 tables, beside Dev\.csv\.gz, validation\.json; it should hold one"):
        load_table(tmp_path)


@pytest.mark.parametrize("below", ["", "data/"])
def test_shards_of_the_hub_are_one_table(tmp_path, below):
    for shard in range(3):
        parquet(tmp_path, f"{below}train-{shard:05}-of-00003.parquet", [{"text": f"t{shard}", "label": shard}])
    parquet(tmp_path, f"{below}test-00000-of-00001.parquet", [{"text": "t", "label": 0}])
    splits = load_table(tmp_path)
    assert splits["train"]["text"][:] == ["t0", "t1", "t2"] and len(splits["test"]) == 1
    (tmp_path / below / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="2 of the 3 files of train: add the others"):
        load_table(tmp_path)


def test_a_table_hides_those_in_data_with_a_warning(tmp_path, caplog):
    write(tmp_path, "sample.csv")
    write(tmp_path, "data/train.csv")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in find_tables(tmp_path)["all"]] == ["sample.csv"]
    assert "not read, since there is sample.csv beside it: data with train.csv" in caplog.text


def test_folders_of_splits_hold_a_table_each(tmp_path):
    for name in ("train", "test"):
        write(tmp_path, f"{name}/metadata.csv", f"file_name,text,label\na.png,{name},x\n")
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    splits = load_table(tmp_path, decode=True)
    assert {name: part["text"][:] for name, part in splits.items()} == {"train": ["train"], "test": ["test"]}
    assert all(part[0]["image"] for part in splits.values())


def test_hidden_files_are_no_tables(tmp_path):
    for name in ("._items.csv", ".items.csv", "items.csv"):
        write(tmp_path, name)
    assert [path.name for path in find_tables(tmp_path)["all"]] == ["items.csv"]


def test_class_names_of_the_hub_are_kept(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "ant"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    train = load_table(tmp_path)["train"]
    assert [train.features["label"].int2str(label) for label in train["label"]] == ["cat", "ant"]


@pytest.mark.parametrize("labels", [[[0], [1], [0]], [[1, 2], [], [2]], [[0, 1], [1, 2], [2, 0]]])
def test_lists_of_classes_of_the_hub_are_several_labels_of_a_row(tmp_path, labels):
    import datasets

    names = ["sad", "angry", "glad"]
    classes = datasets.List(datasets.ClassLabel(names=names))
    features = datasets.Features({"text": datasets.Value("string"), "labels": classes})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "labels": labels}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    train = load_table(tmp_path)["train"]
    known = label_names(train.features["label"])
    found = [{name for name, mark in zip(known, marks, strict=True) if mark} for marks in train["label"]]
    assert found == [{names[i] for i in row} for row in labels]


@pytest.mark.parametrize("first", [0, 1])
def test_a_shard_without_a_split_column_is_not_trained_on(tmp_path, first):
    for shard in range(2):
        more = {"split": "train"} if shard == first else {}
        parquet(tmp_path, f"t-{shard:05}-of-00002.parquet", [{"text": "a", "label": shard} | more])
    with pytest.raises(ValueError, match="row 1 has the split None: write train, validation or test"):
        load_table(tmp_path)
