"""Tables as people write them: splits, headers, separators, encodings and cells of every kind."""

import csv
import io
import json
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import PLAIN, json_lines, parquet, write

from u2a_fast.data import MultimodalCollator, load_table
from u2a_fast.data.table_files import parse_json_lines
from u2a_fast.data.tables import read_samples

FEW = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def all_rows(splits):
    return [row for part in splits.values() for row in part]


# ------------------------------------------------------------------------------------------------- headers, separators
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_separator_is_read_off_the_header(tmp_path, separator, suffix):
    file = io.StringIO()
    rows = [["text", "label"], [f"one{separator} two", "x"], ['says "no"', "y"], ["two\nlines", "x"]]
    csv.writer(file, delimiter=separator).writerows(rows)
    write(tmp_path, f"train.{suffix}", file.getvalue())
    assert load_table(tmp_path)["train"]["text"][:] == [row[0] for row in rows[1:]]


def test_a_separator_is_one_that_the_rows_have_too(tmp_path):
    write(tmp_path, "train.csv", "text;label;note, such as, this\na, b;x;1\nc;y;2\n")
    assert load_table(tmp_path)["train"]["text"][:] == ["a, b", "c"]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_single_column_may_hold_any_separator(tmp_path, suffix):
    rows = ["a, b; c | d", "", "e, f"]
    write(tmp_path, f"t.{suffix}", "\n".join(["text", *rows]))
    assert [row["text"] for row in read_samples(tmp_path)] == ["a, b; c | d", "e, f"]


def test_a_quote_is_a_letter_where_nothing_is_quoted(tmp_path):
    write(tmp_path, "train.tsv", 'text\tlabel\n"Yes" he said\tx\n5" wide\tx\n"all of it\ty\n')
    assert load_table(tmp_path)["train"]["text"][:] == ['"Yes" he said', '5" wide', '"all of it']
    write(tmp_path, "train.tsv", 'text\tlabel\n"Yes" he said\tx\n"two\nlines"\ty\n')  # some are
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: "):
        load_table(tmp_path)
    write(tmp_path, "train.tsv", 'text\tlabel\n"Yes\tx\nno"\ty\n"a"\ty\n')  # balanced, but a cell in each line
    assert load_table(tmp_path)["train"]["text"][:] == ['"Yes', 'no"', '"a"']


def test_a_quoted_cell_of_a_table_of_tabs_may_hold_any_end_of_line(tmp_path):
    write(tmp_path, "train.tsv", 'text\tlabel\n"a\rb"\tx\n"c\r\nd"\ty\n')
    assert load_table(tmp_path)["train"]["text"][:] == ["a\rb", "c\r\nd"]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_quote_may_stand_behind_a_backslash(tmp_path, separator):
    texts = ['says "no"', "a, b\tc", "back\\slash"]
    file = io.StringIO()
    options = {"delimiter": separator, "doublequote": False, "escapechar": "\\", "quoting": csv.QUOTE_ALL}
    csv.writer(file, **options).writerows([["text", "label"], *([text, "x"] for text in texts)])
    write(tmp_path, "train.csv", file.getvalue())
    assert load_table(tmp_path)["train"]["text"][:] == texts


def test_rows_shorter_than_the_header_are_told(tmp_path, caplog):
    write(tmp_path, "train.csv", "label,text\nx,a\ny\nx\n")
    with caplog.at_level(logging.WARNING):
        assert load_table(tmp_path)["train"]["text"][:] == ["a", None, None]
    assert "2 rows are shorter than the header, row 2 for one" in caplog.text
    write(tmp_path, "train.csv", "text,label\na,x\ntext,label\nb,y\n")
    with pytest.raises(ValueError, match="row 2 is the header again: remove it"):
        load_table(tmp_path)


def test_a_blank_may_stand_in_front_of_a_quote(tmp_path):
    write(tmp_path, "train.csv", 'label, text\nx, "a, ""b"""\ny, c\n')
    assert load_table(tmp_path)["train"]["text"][:] == ['a, "b"', "c"]
    write(tmp_path, "train.csv", 'label, text\nx, "a" she said\ny, "c"\n')  # a letter
    assert [text.strip() for text in load_table(tmp_path)["train"]["text"]] == ['"a" she said', '"c"']


def test_blank_lines_of_a_single_column_are_said_to_be_no_rows(tmp_path, caplog):
    write(tmp_path, "t.csv", 'text\na\n""\nb\n\nc\n\n')
    with caplog.at_level(logging.WARNING):
        assert [row["text"] for row in read_samples(tmp_path)] == ["a", None, "b", "c"]
    assert 'blank lines, the one below row 3 for one, are no rows: write ""' in caplog.text
    caplog.clear()
    write(tmp_path, "t.csv", "text\na\n\n\n")
    assert len(read_samples(tmp_path)) == 1 and not caplog.records


def test_blank_cells_beyond_the_header_hold_nothing(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,x,, \nb,y\n")
    assert load_table(tmp_path)["train"]["text"][:] == ["a", "b"]


def test_columns_that_nobody_reads_may_be_there_twice(tmp_path):
    write(tmp_path, "train.csv", "text,note,note,label,\na,1,2,x,\n")
    assert load_table(tmp_path)["train"][0] == {"text": "a", "label": 0}
    (tmp_path / "train.csv").unlink()
    write(tmp_path, "train.jsonl", '{"text": "a", "Note": 1, "note": 2}\n')
    assert load_table(tmp_path)["train"][0] == {"text": "a"}


def unread_columns(kind):
    import pandas as pd
    import pyarrow as pa

    table = {"text": ["a", "b"], "label": ["x", "y"]}
    if kind == "interval":
        return pa.Table.from_pandas(pd.DataFrame({**table, "note": pd.interval_range(0, 2)}))
    if kind == "infinity":  # of Postgres, a year that Python does not know
        return pa.table({**table, "note": pa.array([2**62, 0], pa.timestamp("us"))})
    if kind == "map":
        cells = pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64()))
        return pa.table({**table, "note": cells}).replace_schema_metadata({"pandas": "{}"})
    return pa.Table.from_arrays([pa.array(cells) for cells in (*table.values(), [1, 2], [3, 4])], [*table, "o", "o"])


@pytest.mark.parametrize("kind", ["interval", "map", "twice", "infinity"])
def test_a_column_of_a_parquet_file_that_nobody_reads_may_be_anything(kind, tmp_path):
    from pyarrow.parquet import write_table

    write_table(unread_columns(kind), tmp_path / "train.parquet")
    assert load_table(tmp_path)["train"].to_list() == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def test_a_modality_that_is_not_needed_is_not_looked_at(tmp_path):
    write(tmp_path, "t.csv", "text,audio,img,photo,label\na,no.wav,a,b,x\nb,https://a.b/c.wav,c,d,y\n")
    splits = load_table(tmp_path, modalities=["text"], decode=True)
    assert splits["train"].column_names == ["text", "label"]
    with pytest.raises(
        ValueError, match=r"has the columns \['audio', .*\]; it needs at least one of video: rename one, or pass"
    ):
        load_table(tmp_path, modalities=["video"])
    write(tmp_path, "t.csv", "text,audio,class,target\na,no.wav,1,2\nb,neither.wav,1,2\n")
    assert [row["text"] for row in read_samples(tmp_path)] == ["a", "b"]


def test_a_single_column_needs_no_separator(tmp_path):
    assert load_table(write(tmp_path, "train.csv", "text\na dog\n").parent)["train"]["text"][:] == ["a dog"]


@pytest.mark.parametrize(
    "header", ["Text,LABEL", " text , label ", "\ufefftext,label", '"Text","Label"', "title,category"]
)
def test_headers_may_have_blanks_capitals_a_mark_and_usual_names(tmp_path, header):
    write(tmp_path, "train.csv", f"{header}\na,x\n")
    assert load_table(tmp_path)["train"][0] == {"text": "a", "label": 0}


def test_the_line_that_tells_excel_the_delimiter_is_no_header(tmp_path):
    for line in ("sep=;\r\n", '"sep=;"\n', "SEP=;\n"):
        write(tmp_path, "train.csv", line + "text;label\na, b;x\n")
        assert load_table(tmp_path)["train"][0] == {"text": "a, b", "label": 0}
    write(tmp_path, "train.csv", 'sep=;\ntext;label\na;x\n"b;y\n')
    with pytest.raises(ValueError, match=r"train\.csv, line 4: "):
        load_table(tmp_path)


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_nothing_below_the_last_of_a_table_with_labels_are_left_out(decode, tmp_path):
    write(tmp_path, "train.csv", "text,label,note\na,x,\n,,\nb,y,\n,,\n,,total\n")
    assert load_table(tmp_path, decode=decode)["train"]["text"] == ["a", "b"]
    write(tmp_path, "train.csv", "text,label\na,x\n,\nb,\n")
    with pytest.raises(ValueError, match="row 3 has no label"):
        load_table(tmp_path, decode=decode)
    write(tmp_path, "train.csv", "text,label\n,\n,\n")
    with pytest.raises(ValueError, match="nothing to learn from"):
        load_table(tmp_path, decode=decode)
    assert len(read_samples(tmp_path)) == 2  # each of which gets an answer


def test_columns_may_be_named(tmp_path):
    write(tmp_path, "train.csv", "Title,caption,kind\na,b,x\n")
    train = load_table(tmp_path, columns={"text": "caption", "label": "Kind"})["train"]
    assert train[0] == {"text": "b", "label": 0}
    with pytest.raises(
        ValueError, match=r"has title and caption for text: choose one with --columns '{\"text\": \"title\"}'"
    ):
        load_table(tmp_path)
    for columns in ({"text": "headline"}, {"picture": "title"}):
        with pytest.raises(ValueError, match=r"has \['Title', 'caption', 'kind'\]; ours are image, text, audio"):
            load_table(tmp_path, columns=columns)


@pytest.mark.parametrize(
    ("header", "columns", "read"),
    [
        ("text,title", {"label": "title"}, {"text", "label"}),
        ("text,label", {"text": "label"}, {"text"}),
        ("title,class", {"text": "class"}, {"text"}),
        ("text,label", {"text": "label", "label": "text"}, {"text", "label"}),
        ("text,label", {"group": "text"}, {"text", "label", "group"}),
        ("title,caption", {"label": "title"}, {"text", "label"}),
    ],
)
def test_a_column_that_was_asked_for_is_read_as_nothing_else(tmp_path, header, columns, read):
    write(tmp_path, "train.csv", f"{header}\na,x\nb,y\n")
    train = load_table(tmp_path, columns=columns)["train"]
    assert set(train.column_names) == read
    cells = [train["text"][0], *([train.features["label"].names[0]] if "label" in read else [])]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize("names", [("text", "label"), ("label", "split"), ("image", "text")])
def test_a_column_is_not_asked_for_twice(tmp_path, names):
    with pytest.raises(ValueError, match=rf"columns says that 'a' of .*t\.csv is {' and '.join(names)}: name another"):
        load_table(write(tmp_path, "t.csv", "a,b\n1,2\n"), columns=dict.fromkeys(names, "A"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "headline,label\na,x\n", r"has the columns \['headline', 'label'\]; it needs at least one of image"),
        ("t.csv", "text,label\n", r"t\.csv has no rows below its header \['label', 'text'\]"),
        ("t.csv", "", r"t\.csv has no rows"),
        ("t.jsonl", "\n\n", r"t\.jsonl has no rows"),
        ("t.csv", "text,Text ,label\na,b,x\n", r"two of them called 'text': rename or remove one"),
        ("t.jsonl", '{"text": "a", "Text": "b"}', r"row 1 has the column .text. in two spellings"),
        ("t.jsonl", '{"text": "a", "text": "b"}', r"line 1 is not JSON \(a name occurs twice"),
        ("t.csv", PLAIN.encode("utf-16"), r"t\.csv is UTF-16 or no text at all: save it as UTF-8"),
        ("t.csv", PLAIN.encode("utf-16-le"), "UTF-16 or no text at all"),
        ("t.csv", "text,label\na,x\ncaf\xe9,y\n".encode("cp1252"), r"t\.csv, line 3: byte 0xe9 .*Windows-1252: save"),
        ("t.csv", 'text,label\n"a,x\nb,y\n', r"t\.csv, line 2: .*safer as \.jsonl"),
        ("t.jsonl", '[{"text": "a"}]', r"t\.jsonl, line 1 is a JSON array: each line of the input must be"),
        ("t.jsonl", '[\n{"text": "a"}\n]', r"t\.jsonl, line 1 is a JSON array of rows: write one object a line"),
        ("t.jsonl", '{"text": "a"}\n{"text"', r"t\.jsonl, line 2 is not JSON \(.* in column 8\): write one object"),
        ("t.jsonl", '{"text": "a"}\n\nnull\n', r"t\.jsonl, line 3 is null: each line of the input must be one object"),
        ("t.jsonl", '{"text": "a"}\n3\n', r"line 2 is 3: each line"),
        ("t.jsonl", "[" * 100_000, r"line 1 is a JSON array of rows"),
        ("t.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", r"line 1 is not JSON"),
        ("t.jsonl", '{"text": "\\ud800", "label": 1}', r"row 1, column text: holds half of a surrogate pair"),
        ("t.parquet", b"PAR1 nonsense PAR1", r"t\.parquet is no Parquet file that can be read"),
        ("t.jsonl", json_lines({"text": ["a", "b"]}), r"row 1, column text: holds the list \['a', 'b'\], and text"),
        ("t.jsonl", json_lines({"text": {"de": "a"}}), r"row 1, column text: holds the dict {'de': 'a'}"),
        ("t.jsonl", json_lines({"text": 1.5}), r"row 1, column text: holds the float 1.5"),
        ("t.jsonl", json_lines({"image": 3}), r"row 1, column image: holds the int 3: write a path"),
        ("t.jsonl", json_lines({"image": ["a", "b"]}), r"row 1, column image: holds 2 files: write one a row"),
        ("t.jsonl", json_lines({"image": {"file": "a"}}), r"row 1, column image: holds the NoneType|record"),
        ("t.jsonl", json_lines({"image": "https://a.org/b.png"}), r"holds the address https://a.org/b.png: download"),
        ("t.jsonl", json_lines({"image": [[[1, 2, 3]]]}), r"column image: holds a list of numbers"),
        ("t.jsonl", json_lines({"audio": [0.1, 0.2]}), r'holds a list of numbers: write a path, or a clip as {"array"'),
        ("t.jsonl", json_lines({"audio": {"array": [0.1]}}), r"a clip given as an array needs its sampling_rate"),
        ("t.jsonl", json_lines({"image": {"bytes": "AAAA"}}), r"record of NoneType and str, not path and bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_with_file_place_and_cure(tmp_path, name, content, message):
    write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_table(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bytes_in_a_text_column_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 1, column text: holds the bytes b'.*', and text needs a string"):
        load_table(parquet(tmp_path, "t.parquet", [{"text": b"abc", "label": 1}]))


def test_files_are_named_in_utf_8(tmp_path):
    folder = tmp_path / "d\udcff"
    folder.mkdir()
    write(folder, "t.csv", "text,image,label\na,b.png,x\n")
    with pytest.raises(ValueError, match=r"row 1, column image: names '.*', which is no name in UTF-8: rename"):
        load_table(folder)


def test_json_lines_end_at_line_feeds_alone():
    rows = [{"text": "a\u2028b\u2029c\x85d\x0be"}, {"text": "f"}]
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert parse_json_lines(b"\xef\xbb\xbf" + content.encode(), "t") == rows


# ---------------------------------------------------------------------------------------------------------------- cells
def test_what_the_collator_takes_a_table_takes(tmp_path, picture, clip, image_processor, feature_extractor):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "sub").mkdir()
    picture.save(tmp_path / "sub" / "a.png")
    soundfile.write(tmp_path / "sub" / "a.wav", clip, 16000, subtype="FLOAT")
    image, sound = (tmp_path / "sub" / "a.png").read_bytes(), (tmp_path / "sub" / "a.wav").read_bytes()
    lines = [
        {"image": "sub/a.png", "audio": "sub/a.wav"},
        {"image": " sub/a.png ", "audio": ["sub/a.wav"]},
        {"image": {"path": "sub/a.png"}, "audio": {"path": "sub/a.wav", "bytes": None}},
        {"image": ["sub/a.png"], "audio": {"array": clip.tolist(), "sampling_rate": 16000}},
        {"image": "sub\\a.png", "audio": "sub\\a.wav"},
        {"image": str(tmp_path / "sub" / "a.png"), "audio": {"array": [clip.tolist()] * 2, "sampling_rate": 16000.0}},
    ]
    records = [
        {"image": image, "audio": sound},
        {"image": {"path": "x.png", "bytes": image}, "audio": {"path": None, "bytes": sound}},
    ]
    write(tmp_path, "train.jsonl", json_lines(*lines))
    rows = list(load_table(tmp_path)["train"])
    for number, record in enumerate(records):
        rows += list(load_table(parquet(tmp_path, f"p{number}/train.parquet", [record]).parent)["train"])
    batch = MultimodalCollator({"image": image_processor, "audio": feature_extractor})(rows)
    assert batch["modality_mask"].all() and len(rows) == 8
    for tensor in (batch["image"]["pixel_values"], batch["audio"]["input_features"]):
        assert np.allclose(tensor, tensor[:1], atol=1e-4)


def test_a_clip_of_nothing_is_absent(tmp_path):
    pytest.importorskip("soundfile")
    write(tmp_path, "train.jsonl", json_lines({"audio": {"array": [], "sampling_rate": 8000}, "text": "a"}))
    assert load_table(tmp_path)["train"][0]["audio"] is None


def test_numbers_as_texts_stay_what_they_are(tmp_path):
    write(tmp_path, "train.jsonl", json_lines({"text": 300}, {"text": "007"}))
    assert load_table(tmp_path)["train"]["text"][:] == ["300", "007"]


VALUES = st.none() | st.text(max_size=8) | st.integers() | st.floats() | st.lists(st.text(max_size=3), max_size=2)
NAMES = st.sampled_from(["image", "text", "audio", "label", "Text", " label", "split", "title", "x"]) | st.text(
    max_size=5
)


@pytest.mark.slow
@FEW
@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=4))
def test_any_rows_load_or_are_refused_in_a_sentence(tmp_path, rows):
    write(tmp_path, "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    try:
        splits = load_table(tmp_path / "t.jsonl", decode=True)
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and len(str(error).splitlines()) == 1
    else:
        assert all(row.get("text") or row.get("image") or row.get("audio") for row in all_rows(splits))


@pytest.mark.slow
@FEW
@given(st.lists(st.lists(st.text(max_size=6) | st.sampled_from(['"', ";", "a\nb", "1"]), max_size=4), max_size=5),
       st.sampled_from(["text,label", "Text;label", "\ufefftext\tlabel", "text", '"text,label']))  # fmt: skip
def test_any_table_of_cells_loads_or_is_refused_in_a_sentence(tmp_path, rows, header):
    lines = [header, *(",".join(row) for row in rows)]
    write(tmp_path, "t.csv", "\n".join(lines).encode("utf-8", "surrogatepass"))
    try:
        load_table(tmp_path / "t.csv", decode=True)
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and len(str(error).splitlines()) == 1
