"""Answers: under which names samples come in, and where what a model says of them is written."""

import io
import json
import os
import stat
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from u2a_fast.prediction import answers, check_output, predict_answers, samples_from, write_answers

ANSWERS = [{"value": 1.5}, {}]


def type_in(monkeypatch, *rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(lines.encode())))


def test_columns_are_renamed_on_the_standard_input_too(monkeypatch):
    type_in(monkeypatch, {"headline": "red", "id": 1}, {"text": "blue"})
    assert [row["text"] for row in samples_from("-", {"text": "headline"})] == ["red", "blue"]
    type_in(monkeypatch, {"headline": "red"})
    with pytest.raises(ValueError, match="columns says 'text': 'titel', but the standard input has headline: correct"):
        samples_from("-", {"text": "titel"})
    type_in(monkeypatch)
    assert samples_from("-", {"text": "headline"}) == []


@pytest.mark.parametrize(("columns", "read"), [(None, ["red", "green"]), ({"text": "title"}, ["blue", "blue"])])
@pytest.mark.parametrize("place", ["-", "table.jsonl"])
def test_usual_columns_are_read_where_they_are(place, columns, read, tmp_path, monkeypatch):
    row, usual = {" HEADLINE": "red", "title": "blue", "text": "green"}, {"text": "headline", "image": "picture"}
    for expected in read:
        type_in(monkeypatch, row)
        (tmp_path / "table.jsonl").write_text(json.dumps(row))
        (found,) = samples_from(place if place == "-" else str(tmp_path / place), columns, usual)
        assert found["text"] == expected and "image" not in found
        row.pop(" HEADLINE", None)


def test_names_of_tables_are_read_on_the_standard_input_too(monkeypatch):
    type_in(monkeypatch, {" Text": "red", "Photo": "a.png"}, {"front": "b.png"}, {" Text": "blue"})
    rows = samples_from("-")
    assert [(row.get("text"), row.get("image"), row.get("front")) for row in rows] == [
        ("red", "a.png", None), (None, None, "b.png"), ("blue", None, None)
    ]  # fmt: skip
    type_in(monkeypatch, {"text": "red", "caption": "blue"})
    assert samples_from("-")[0]["text"] == "red"


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"text": 5}, {"text": "5"}),
        ({"TEXT": "red"}, {"text": "red"}),
        ({"text": " "}, {"text": None}),
        ({"image": " /a/b.png"}, {"image": "/a/b.png"}),
        ({"image": "file:///a/b%20c.png"}, {"image": "/a/b c.png"}),
        ({"image": {"path": "a.png"}}, {"image": "a.png"}),
        ({"image": ["a.png"]}, {"image": "a.png"}),
        ({"Photo": "./a.png", "label": [1]}, {"image": "a.png"}),
    ],
)
def test_a_line_is_read_as_the_row_of_a_table(row, read, monkeypatch, tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps(row))
    type_in(monkeypatch, row, {"text": "blue"})
    first, second = samples_from("-")
    assert read.items() <= first.items() and second["text"] == "blue"
    (from_table,) = samples_from(str(table))
    places = [cell["path"] if isinstance(cell, dict) else cell for cell in from_table.values()]
    assert places == [cell and str(tmp_path / cell) if "image" in read else cell for cell in read.values()]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["a"]}, r"row 1, column text: holds the list \['a'\], and text needs a string"),
        ({"image": {"bytes": "/a/b.png"}}, "row 1, column image: holds a record of NoneType and str, not path and"),
        ({"image": "https://a.b/c.png"}, "row 1, column image: holds the address"),
        ({"text": "a", "Text": "b"}, "row 1 has the column 'text' in two spellings"),
        ({"title": "a", "caption": "b"}, "has title and caption for text: choose one"),
    ],
)
def test_a_line_that_no_table_could_hold_is_refused(row, message, monkeypatch):
    type_in(monkeypatch, row)
    with pytest.raises(ValueError, match=f"standard input.*{message}"):
        samples_from("-")


def test_a_column_that_was_renamed_on_the_standard_input_is_read_as_nothing_else(monkeypatch):
    type_in(monkeypatch, {"Title": "a.png", "id": 1})
    assert samples_from("-", {"image": "title"}) == [{"image": "a.png", "id": 1}]
    type_in(monkeypatch, {"photo": "a.png"})
    assert samples_from("-", {"front": "photo"}, modalities=["front"]) == [{"front": "a.png"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"front": "photo"}, "columns says 'front': 'photo', but ours are image, text, audio, video, label"),
        ({"image": "photo", "text": "Photo"}, "columns says that 'photo' is image and text: name another column"),
    ],
)
def test_columns_that_mean_nothing_are_refused_on_the_standard_input_too(columns, message, monkeypatch):
    type_in(monkeypatch, {"photo": "a.png"})
    with pytest.raises(ValueError, match=message):
        samples_from("-", columns)


def test_samples_without_any_column_of_the_model_are_a_mistake():
    model = SimpleNamespace(config=SimpleNamespace(modalities=("image", "text")))
    with pytest.raises(ValueError, match="no sample has a column for image or text; there are body, id: rename one"):
        predict_answers(model, [{"body": "red", "id": 1}, {"body": "blue"}])


def test_samples_may_be_what_predict_takes():
    class Model(SimpleNamespace):
        config = SimpleNamespace(modalities=("text",), id2label={0: "a", 1: "b"}, num_labels=2)
        all_absent = "prior"

        def predict(self, samples, batch_size):
            return torch.tensor([[float(len(sample["text"])), 2.0] for sample in samples])

        def problem_type(self, labels):
            return "single_label_classification"

    for samples in (["x", "xyz"], ({"text": text} for text in ("x", "xyz")), pd.DataFrame({"text": ["x", "xyz"]})):
        assert [answer["label"] for answer in predict_answers(Model(), samples)] == ["b", "a"]
    assert predict_answers(Model(), iter(())) == []
    with pytest.raises(ValueError, match="top_k must be at least 1, not 0"):
        predict_answers(Model(), ["x"], top_k=0)


def test_answers_do_not_replace_the_samples(tmp_path, monkeypatch):
    samples = tmp_path / "samples.csv"
    samples.write_text("text\nred\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--output samples\.csv is the input, which the answers would replace"):
        check_output("samples.csv", str(samples))
    check_output("answers.csv", str(samples))


def test_a_label_is_given_by_its_probability_and_not_by_what_is_shown_of_it(tmp_path):
    config = SimpleNamespace(id2label={0: "labels", 1: "b"}, num_labels=2)
    model = SimpleNamespace(config=config, problem_type=lambda labels: "multi_label_classification")
    said = list(answers(model, torch.tensor([[1e-5, -1e-5], [1.0, 2.0]])))
    assert said[0] == {"labels": ["labels"], "probabilities": {"labels": 0.5, "b": 0.5}}
    write_answers(said, str(tmp_path / "answers.csv"))
    lines = (tmp_path / "answers.csv").read_text().splitlines()
    assert lines == ["labels,labels ,b", "labels,0.5,0.5", "labels|b,0.7311,0.8808"]


def test_the_folder_of_the_output_is_made(tmp_path):
    check_output(str(tmp_path / "new" / "deep" / "answers.csv"))
    write_answers(ANSWERS, str(tmp_path / "new" / "deep" / "answers.csv"))
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["answers.csv"]


@pytest.mark.parametrize(("place", "message"), [("folder", "is a folder: name a file"), ("file/x", "is no folder and")])
def test_a_place_that_cannot_be_written_is_refused(place, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        check_output(str(tmp_path / place))
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file"}


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_output(str(pipe))
        write_answers(ANSWERS, str(pipe))
        assert os.read(reader, 100) == b'{"value": 1.5}\n{}\n' and stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)
