"""Answers: under which names samples come in, and where what a model says of them is written."""

import io
import json
import os
import stat
from types import SimpleNamespace

import pytest

from u2a_fast.prediction import check_output, samples_from, write_answers

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
