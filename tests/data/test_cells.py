"""Cells of a table: every usual way to name or hold a file is read, and what is none is refused in a short sentence."""

import base64
import io
import json
import unicodedata

import pytest
from PIL import Image

from u2a_fast.data import load_table

PNG = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(PNG, "png")
PNG = PNG.getvalue()


def table(folder, *cells, column="image", name="t.jsonl"):
    lines = [json.dumps({column: cell, "text": "a", "label": number}) for number, cell in enumerate(cells)]
    (folder / name).write_text("\n".join(lines))
    return folder / name


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/png;charset=utf-8;base64,", " data:;base64,\n"])
def test_a_picture_may_be_written_out_in_base64(head, tmp_path):
    cell = head + base64.encodebytes(PNG).decode()
    (part,) = load_table(table(tmp_path, cell, cell, name="train.jsonl").parent, decode=True).values()
    assert part["image"][:] == [{"path": None, "bytes": PNG}] * 2


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "data:image/png;base64," + "A" * 2001,
            r"row 2, column image: holds 'data:image/png;base64,A+'\.\., which is no",
        ),
        (
            "iVBORw0KGgo" + "A/" * 1000,
            r"row 2, column image: holds 2011 characters, 'iVBORw0KGgo.*'\.\., which are no path",
        ),
        ("https://a.b/" + "c" * 900, r"row 2, column image: holds the address https://a\.b/c+: download the file"),
        ("c" * 900, r"none of the 1 files of the column image .* exists"),
    ],
)
def test_a_long_cell_is_cut_in_what_is_said_of_it(cell, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_table(table(tmp_path, None, cell))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("table_form", ["NFC", "NFD"])
@pytest.mark.parametrize("disk_form", ["NFC", "NFD"])
def test_a_file_is_found_however_its_accents_are_written(table_form, disk_form, tmp_path):
    there, said = (unicodedata.normalize(form, "caf\u00e9/\u00e5.png") for form in (disk_form, table_form))
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).write_bytes(PNG)
    splits = load_table(table(tmp_path, said, said, "\u00fc.png"))
    found = [row["image"] and row["image"]["path"] for part in splits.values() for row in part]
    assert sorted(map(str, found)) == sorted([str(tmp_path / there)] * 2 + ["None"])


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.wav", "b.FLAC", ""], "audio"),
        (["a.mp4", " b.mov "], "video"),
        (["a.png", "b.jpg"], "image"),
        (["a.png", "b.wav"], "image"),
        (["a", "b"], "image"),
    ],
)
def test_files_of_the_hub_are_of_the_kind_that_their_names_say(names, kind, tmp_path, caplog):
    for name in filter(None, names):
        (tmp_path / name.strip()).touch()
    splits = load_table(table(tmp_path, *names, column="File_Name"))
    assert set(splits["train"].column_names) == {kind, "text", "label"}
    assert f"the column file_name is read as {kind}" in caplog.text
