import json
import logging

import pytest
from PIL import Image

from u2a_fast.data import load_table
from u2a_fast.data.labels import label_names
from u2a_fast.data.tables import read_samples

NAN = float("nan")


def write(folder, name="table.csv", text="text,label\na,x\nb,y\n"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def rows(splits):
    return [row for part in splits.values() for row in part]


@pytest.fixture
def pictures(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").touch()
    return tmp_path


def test_paths_are_relative_to_the_table_and_empty_cells_are_absent(pictures):
    table = write(pictures, text="image,text,label\n0.png,a dog,animal\n,a car,thing\n2.png,,animal\n")
    by_label = sorted(rows(load_table(table)), key=lambda row: (row["text"] or "", row["label"]))
    assert [row["text"] for row in by_label] == [None, "a car", "a dog"]
    assert [row["image"] and row["image"]["path"] for row in by_label] == [
        str(pictures / "2.png"), None, str(pictures / "0.png")
    ]  # fmt: skip
    assert [row["label"] for row in by_label] == [0, 1, 0]


@pytest.mark.parametrize("text", ["NA", "null", "None", "nan", "007"])
def test_texts_that_look_like_something_else_stay_texts(tmp_path, text):
    loaded = rows(load_table(write(tmp_path, text=f"text,label\n{text},x\n{text},y\n")))
    assert [row["text"] for row in loaded] == [text, text]


def test_paths_may_be_written_as_addresses_of_files_or_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "home" / "a b.png")
    address = (tmp_path / "home" / "a b.png").as_uri()
    assert "%20" in address
    table = write(tmp_path, text=f"image,label\n~/a b.png,x\n {address},y\nhome/a b.png,x\n")
    rows = [row for part in load_table(table).values() for row in part]
    assert {row["image"]["path"] for row in rows} == {str(tmp_path / "home" / "a b.png")}
    with pytest.raises(ValueError, match=r"row 1, column image: holds the address https://a\.b/c\.png: download"):
        load_table(write(tmp_path, text="image,label\n https://a.b/c.png,x\n"))


def test_nan_is_a_hole_in_every_column(pictures):
    rows = [{"image": "0.png", "text": "a", "group": "g", "label": 0}, dict.fromkeys(("image", "text", "group"), NAN)]
    write(pictures, "train.jsonl", "".join(json.dumps({"label": 1} | row) + "\n" for row in rows))
    train = load_table(pictures)["train"]
    assert train[1] == {"image": None, "text": None, "group": None, "label": 1}
    assert train[0]["text"] == "a"


@pytest.mark.parametrize("labels", [[0, 1, NAN], [0.5, 1.5, NAN], ["a", "b", NAN]], ids=str)
def test_a_label_that_is_nan_is_no_label(tmp_path, labels):
    text = "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels)
    with pytest.raises(ValueError, match="row 3 has no label"):
        load_table(write(tmp_path, "table.jsonl", text))


@pytest.mark.parametrize("label", ["nan", "inf"])
def test_what_is_not_finite_is_refused_among_numbers_and_a_name_among_names(tmp_path, label):
    with pytest.raises(ValueError, match=f"1 of the numeric labels are {label}"):
        load_table(write(tmp_path, text=f"text,label\na,0\nb,1\nc,{label}\n"))
    write(tmp_path, "train.csv", f"text,label\na,x\nb,{label}\n")
    assert load_table(tmp_path)["train"].features["label"].names == [label, "x"]


@pytest.mark.parametrize("labels", [[row / 7 for row in range(100)], [[row % 2, row % 3] for row in range(100)]],
                         ids=["numbers", "vectors"])  # fmt: skip
def test_one_table_without_classes_fills_every_split(tmp_path, labels):
    text = "".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels)
    splits = load_table(write(tmp_path, "table.jsonl", text))
    assert [len(part) for part in splits.values()] == [pytest.approx(share, abs=2) for share in (65, 10, 25)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [(["b", "a", "b"], ["a", "b"]), (["10", "2", "10"], ["2", "10"]), (["-1", "0", "1"], ["-1", "0", "1"]),
     (["a", "1", "2"], ["1", "2", "a"])],
)  # fmt: skip
def test_strings_and_whole_numbers_become_classes(tmp_path, labels, names):
    write(tmp_path, "train.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels))
    train = load_table(tmp_path)["train"]
    assert train.features["label"].names == names
    assert [names[label] for label in train["label"]] == labels


def test_other_numbers_and_lists_stay_numbers(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,0.5\nb,2\n")
    assert load_table(tmp_path)["train"]["label"][:] == [0.5, 2.0]
    (tmp_path / "train.csv").unlink()
    write(tmp_path, "train.jsonl", '{"text": "a", "label": [0, 1]}\n{"text": "b", "label": [1, 1]}\n')
    assert load_table(tmp_path)["train"]["label"][:] == [[0, 1], [1, 1]]


def test_true_and_false_become_classes(tmp_path):
    write(tmp_path, "train.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}\n')
    train = load_table(tmp_path)["train"]
    assert train.features["label"].names == ["False", "True"]
    assert train["label"][:] == [1, 0]


def test_named_tables_are_taken_as_they_are_with_the_classes_of_all(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,x\n")
    write(tmp_path, "test.csv", "text,label\nb,a\nc,x\n")
    splits = load_table(tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 1, "test": 2}
    assert splits["train"].features["label"].names == ["a", "x"]
    assert splits["test"]["label"][:] == [0, 1]


def test_a_table_without_labels_loads_for_prediction(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,x\n")
    write(tmp_path, "test.csv", "text\nb\n")
    assert load_table(tmp_path)["test"][0] == {"text": "b"}


def test_one_table_is_split_by_seed_with_groups_together(tmp_path):
    lines = "".join(f"text {number},{number % 4},{number // 3}\n" for number in range(300))
    table = write(tmp_path, text="text,label,group\n" + lines)
    splits = load_table(table)
    groups = [set(part["group"]) for part in splits.values()]
    assert sum(map(len, groups)) == 100
    assert [len(part) for part in splits.values()] == [pytest.approx(share, abs=3) for share in (195, 30, 75)]
    assert load_table(tmp_path)["test"]["text"][:] == splits["test"]["text"][:]
    assert load_table(table, seed=1)["test"]["text"][:] != splits["test"]["text"][:]


@pytest.mark.parametrize("none", ["NA", "nan", "\\N", ""])
def test_rows_without_a_group_are_not_one(none, tmp_path):
    lines = "".join(f"{i},{i % 2},{none if i % 3 else i}\n" for i in range(60))
    splits = load_table(write(tmp_path, text="text,label,group\n" + lines))
    assert all(None in part["group"][:] for part in splits.values())


def test_a_group_is_one_however_it_is_written(tmp_path):
    lines = "".join(f'{{"text": "{i}", "label": {i % 2}, "group": {group}}}\n'
                    for i in range(40) for group in (i, f"{i}.0", f'" {i}"'))  # fmt: skip
    splits = load_table(write(tmp_path, "t.jsonl", lines))
    groups = [set(part["group"]) for part in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 40


@pytest.mark.parametrize("spelled", ["{}.0", "{}.", " {}.00 "])
def test_a_group_of_a_csv_file_is_one_however_it_is_written(spelled, tmp_path, caplog):
    lines = [f"t{i},{i % 2},{split},{spelled.format(i) if split == 'test' else i}" for i in (10, 21)
             for split in ("train", "test")]  # fmt: skip
    load_table(write(tmp_path, text="\n".join(["text,label,split,group", *lines])), decode=True)
    assert "2 of 2 rows to test have the group of a row to train on" in caplog.text
    names = ["1.10", "1.0.0", "v1.0"]
    write(tmp_path, text="\n".join(["text,label,group", *(f"t,{i},{name}" for i, name in enumerate(names))]))
    assert {row["group"] for row in rows(load_table(tmp_path))} == set(names)


def test_what_lies_in_train_and_test_is_told(pictures, caplog):
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(pictures / f"{number}.png")
    rows = [("0.png", "x", "train"), ("1.png", "y", "train"), ("2.png", "x", "val"), ("0.png", "y", "test")]
    lines = "".join(f"{image},{label},{split},{place}\n" for place, (image, label, split) in enumerate(rows))
    table = write(pictures, text="image,label,split,group\n" + lines)
    load_table(table, decode=True)
    assert "1 of 1 rows to test have the image of a row to train on" in caplog.text and "the group" not in caplog.text
    caplog.clear()
    load_table(write(pictures, text="image,label,split,group\n" + lines.replace(",3", ",2")), decode=True)
    assert "1 of 1 rows to test have the group of a row to train on" in caplog.text
    caplog.clear()
    load_table(write(pictures, text="image,label,split\n0.png,x,train\n1.png,y,test\n"), decode=True)
    assert not caplog.text


def test_all_formats_give_the_same(pictures):
    import pyarrow as pa
    from pyarrow import parquet

    records = [
        {"image": "0.png", "text": "a", "label": 1, "group": "g", "other": "ignored"},
        {"image": None, "text": 'b, quoted "c"\nsecond line', "label": 0, "group": "h", "other": None},
    ]
    for name in ("csv", "jsonl", "parquet"):
        (pictures / name).mkdir()
        (pictures / name / "0.png").touch()
    import csv

    with open(pictures / "csv" / "train.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    write(pictures / "jsonl", "train.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    parquet.write_table(pa.Table.from_pylist(records), pictures / "parquet" / "train.parquet")

    loaded = [load_table(pictures / name)["train"] for name in ("csv", "jsonl", "parquet")]
    for name, dataset in zip(("csv", "jsonl", "parquet"), loaded, strict=True):
        assert dataset.features == loaded[0].features
        assert dataset[0]["image"]["path"] == str(pictures / name / "0.png")
        assert [row | {"image": None} for row in dataset] == [row | {"image": None} for row in loaded[0]]


def test_parquet_may_hold_the_files_themselves(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    records = [{"image": {"bytes": b"content", "path": None}, "label": "a"}, {"image": None, "label": "b"}]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "train.parquet")
    train = load_table(tmp_path)["train"]
    assert train["image"][:] == [{"bytes": b"content", "path": None}, None]


def test_some_missing_files_are_absent_with_one_warning(pictures, caplog):
    table = write(pictures, "train.csv", "image,label\n0.png,x\n8.png,y\n9.png,x\n")
    with caplog.at_level(logging.WARNING):
        train = load_table(table.parent)["train"]
    assert [cell is None for cell in train["image"]] == [False, True, True]
    assert len(caplog.messages) == 1
    assert "2 of 3 image files do not exist" in caplog.text
    assert "8.png" in caplog.text


def test_all_files_missing_is_a_mistake(tmp_path):
    table = write(tmp_path, text="image,text,label\n8.png,a,x\n9.png,b,y\n")
    with pytest.raises(FileNotFoundError, match=r"none of the 2 files of the column image .*relative to the table"):
        load_table(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,label\na.png,x\n", "needs at least one of image, text, audio"),
        ("text,label\na,x\nb,\n", "row 2 has no label"),
        ("text,label\na,x\nb,c,d\n", "row 2 has more cells than the header"),
        ("text,label\n" + '"' + "a" * 200_000 + ",x\n", "safer as .jsonl"),
    ],
)
def test_tables_that_cannot_be_used_say_why(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_table(write(tmp_path, text=text))


def test_paths_that_hold_no_table_say_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        load_table(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds 0 tables"):
        load_table(tmp_path)
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        load_table(write(tmp_path, "table.xlsx"))
    write(tmp_path, "train.csv")
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(ValueError, match="2 tables for train"):
        load_table(tmp_path)


def test_a_split_column_decides(tmp_path):
    lines = [f"t{i},{i % 2},{split}" for i, split in enumerate(["Train", "test", " DEV ", "train", "val"])]
    splits = load_table(write(tmp_path, "t.csv", "text,label,Split\n" + "\n".join(lines)))
    assert {name: part["text"][:] for name, part in splits.items()} == {
        "train": ["t0", "t3"], "validation": ["t2", "t4"], "test": ["t1"]
    }  # fmt: skip
    assert "split" not in splits["train"].column_names
    for wrong in ("holdout", ""):
        with pytest.raises(ValueError, match=r"row 2 has the split .*: write train, validation or test"):
            load_table(write(tmp_path, "t.csv", f"text,label,split\na,x,train\nb,y,{wrong}\n"))


def test_a_row_of_a_split_s_table_is_of_that_split(tmp_path):
    write(tmp_path, "test.csv", "text,label\na,x\nb,y\n")
    write(tmp_path, "train.csv", "text,label,split\na,x,Training\nb,y,\nc,x,fold 1\n")
    assert len(load_table(tmp_path)["train"]) == 3
    write(tmp_path, "train.csv", "text,label,split\na,x,train\nb,y,Test\n")
    with pytest.raises(
        ValueError, match=r"train\.csv, row 2 has the split 'Test', but its table is that of train: move"
    ):
        load_table(tmp_path)


def test_a_train_table_may_hold_the_validation_split(tmp_path):
    write(tmp_path, "test.csv", "text,label\na,x\nb,y\n")
    write(tmp_path, "train.csv", "text,label,split\na,x,train\nb,y,val\nc,y,train\n")
    assert {name: part["text"] for name, part in load_table(tmp_path).items()} == {
        "train": ["a", "c"], "test": ["a", "b"], "validation": ["b"]
    }  # fmt: skip
    write(tmp_path, "dev.csv", "text,label\na,x\n")
    with pytest.raises(ValueError, match=r"train\.csv, row 2 has the split 'val'"):
        load_table(tmp_path)


@pytest.mark.parametrize("name", ["set", "Partition", "subset", "fold"])
def test_a_column_that_seems_to_be_a_split_is_not_ignored_in_silence(tmp_path, caplog, name):
    lines = [f"t{i},{i % 2},{'test' if i > 6 else 'train'}" for i in range(10)]
    table = write(tmp_path, "t.csv", "\n".join([f"text,label,{name}", *lines]))
    load_table(table)
    assert len(caplog.messages) == 1 and f"the column {name} is not read" in caplog.text
    assert f'pass --columns \'{{"split": "{name.casefold()}"}}\'' in caplog.text
    caplog.clear()
    assert len(load_table(table, columns={"split": name.casefold()})["test"]) == 3
    load_table(write(tmp_path, "t.csv", f"text,label,{name}\na,x,music\nb,y,1\n"))
    read_samples(write(tmp_path, "t.csv", "\n".join([f"text,label,{name}", *lines])))
    load_table(write(tmp_path, "t.csv", f"text,label,{name},split\na,x,train,train\nb,y,test,test\n"))
    assert not caplog.text


def test_several_labels_of_a_row_become_a_vector(tmp_path):
    write(tmp_path, "train.csv", "text;labels\na;x|y\nb;y\n")
    train = load_table(tmp_path, label_separator="|")["train"]
    assert train["label"][:] == [[1, 1], [0, 1]] and label_names(train.features["label"]) == ["x", "y"]
    write(tmp_path, "train.csv", "text,label\na,1\nb,2\n")
    assert load_table(tmp_path, task="regression")["train"]["label"][:] == [1.0, 2.0]


@pytest.mark.parametrize("name", ["text", "\u200btext", "\ufeff\ufefftext", " Te\u00adxt\u00a0"])
def test_what_nobody_sees_in_a_header_hides_no_column(name, tmp_path):
    table = write(tmp_path, text=f"\n{name},label\na,x\nb,y\nc,x\n")
    assert {row["text"] for row in rows(load_table(table))} == {"a", "b", "c"}
    with pytest.raises(ValueError, match=r"row 2 has more cells"):
        load_table(write(tmp_path, text=f"\n{name},label\na,x\nb,y,z\n"))


def test_a_name_in_another_form_of_unicode_is_that_column(tmp_path):
    table = write(tmp_path, text="U\u0308ber,label\na,x\nb,y\n")
    assert {row["text"] for row in rows(load_table(table, columns={"text": "\u00dcber"}))} == {"a", "b"}
    with pytest.raises(ValueError, match="columns says 'text': 0, but"):
        load_table(table, columns={"text": 0})


def test_a_cell_may_be_as_long_as_a_picture(tmp_path):
    long = "a" * 200_000
    assert long in {row["text"] for row in rows(load_table(write(tmp_path, text=f"text,label\n{long},x\nb,y\n")))}


def test_a_single_name_of_a_file_that_is_not_there_ends_nothing(tmp_path, caplog):
    lines = "".join(f"t{i},{'gone.png' if i == 3 else ''},{i % 2}\n" for i in range(20))
    splits = load_table(write(tmp_path, text="text,image,label\n" + lines), decode=True)
    assert sum(map(len, splits.values())) == 20 and "1 of 1 image files do not exist" in caplog.text


@pytest.mark.parametrize("one, other", [("Jose\u0301", "Jos\u00e9"), ("a  b", "a b")])
def test_groups_are_one_in_any_spelling(one, other, tmp_path):
    lines = "".join(f"t{i},{i % 2},{(one, other)[i % 2]}\n" for i in range(8))
    splits = load_table(write(tmp_path, text="text,label,group\n" + lines + "u,0,c\nv,1,d\nw,0,e\nx,1,f\n"))
    (home,) = (part["text"] for part in splits.values() if "t0" in part["text"])
    assert {f"t{i}" for i in range(8)} <= {*home}
