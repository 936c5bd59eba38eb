"""Presence is decided once, from what can be decoded, and holes are drawn over it."""

import io
import itertools
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from u2a_fast.data import MissingPattern, MultimodalCollator, load_table, with_missing
from u2a_fast.data.presence import batches_of, readable, samples_of

PAIR = ("image", "text")
NO_PICTURE = b"\x89PNG nonsense"


@pytest.fixture
def picture_bytes(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


@pytest.fixture
def rows(picture_bytes):
    """30 rows, all complete but for six whose picture cannot be decoded."""
    return [
        {"image": NO_PICTURE if i % 5 == 0 else picture_bytes, "text": f"a dog {i}", "label": i % 2} for i in range(30)
    ]


@pytest.fixture
def collate(image_processor, tokenizer):
    return MultimodalCollator({"image": image_processor, "text": tokenizer})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["both", "any", "image", "text"])
def test_no_hole_takes_what_is_left_of_a_row_with_a_broken_file(rows, collate, seed, kind):
    for rate in (0.3, 0.7, 1.0):
        holed = with_missing(rows, MissingPattern(rate=rate, kind=kind, seed=seed), PAIR)
        assert collate([holed[i] for i in range(30)])["modality_mask"].tolist() == holed.table.tolist()
        assert holed.table.any(dim=1).all()


def test_what_cannot_be_read_is_reported_once_and_by_row(rows, caplog):
    with caplog.at_level(logging.WARNING):
        holed = with_missing(rows, MissingPattern(rate=0), PAIR)
        assert [holed[i]["image"] is None for i in range(6)] == [True, False, False, False, False, True]
    (message,) = caplog.messages
    assert message.startswith(
        "the data: 6 of 30 image cells cannot be decoded and count as absent (rows 1, 6, 11, 16, 21"
    )
    assert "and 1 more" in message


@pytest.mark.parametrize("nothing", [None, " ", NO_PICTURE])
def test_rows_with_nothing_are_left_out_or_kept(rows, nothing, caplog):
    empty = {"image": nothing, "text": "", "label": 1}
    data = [*rows[:4], empty, *rows[4:]]
    with caplog.at_level(logging.WARNING):
        holed = with_missing(data, MissingPattern(), PAIR)
    assert len(holed) == 30 and [holed[i]["text"] is None or holed[i]["label"] == i % 2 for i in range(30)]
    assert "1 of 31 samples have nothing that can be read and are left out (rows 5)" in caplog.text
    kept = with_missing(data, MissingPattern(), PAIR, all_absent="prior")
    assert len(kept) == 31 and kept[4]["image"] is None and not kept.table[4].any()


def test_a_table_given_for_all_rows_stays_with_its_rows(rows):
    rows[2]["text"] = rows[2]["image"] = None
    table = torch.ones(30, 2, dtype=torch.bool)
    table[3] = torch.tensor([True, False])
    holed = with_missing(rows, table, PAIR)
    assert holed[2]["text"] is None and holed.rows[2] == 3


def test_data_sets_of_hugging_face_leave_decoding_to_us(rows, collate):
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    data = datasets.Dataset.from_list(
        [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows], features=datasets.Features(features)
    )
    holed = with_missing(data, MissingPattern(rate=0), PAIR)
    assert holed.table[:, 0].tolist() == [i % 5 > 0 for i in range(30)]
    assert collate(list(samples_of(data)))["modality_mask"].tolist() == holed.table.tolist()


def test_modalities_of_any_name_are_read_by_their_processor(rows, image_processor, tokenizer):
    renamed = [{"photo": row["image"], "caption": row["text"]} for row in rows]
    collate = MultimodalCollator({"photo": image_processor, "caption": tokenizer})
    assert readable(renamed, collate)[:, 0].tolist() == [i % 5 > 0 for i in range(30)]
    assert readable(renamed, ("photo", "caption")).all()  # by the name alone nobody knows that it is a picture


def test_a_value_that_no_column_should_hold_is_named_with_its_row(rows):
    rows[7]["text"] = 3.5
    with pytest.raises(ValueError, match=r"the data, row 8, column text: holds the float .*; a text must be a string"):
        with_missing(rows, MissingPattern(), PAIR)


# ------------------------------------------------------------------------------------------------------------ streams
@pytest.mark.slow
@pytest.mark.parametrize("rate", [0, 0.4, 1])
def test_a_stream_gets_its_holes_as_it_comes_by(rows, rate):
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows * 20))
    for data in (stream, itertools.islice(itertools.cycle(rows), 600)):
        table = torch.tensor(
            [[s["image"] is not None, s["text"] is not None] for s in with_missing(data, MissingPattern(rate), PAIR)]
        )
        assert len(table) == 600 and table.any(dim=1).all()
        whole = table[[i for i in range(600) if i % 5]]
        assert (~whole).any(dim=1).float().mean() == pytest.approx(rate, abs=0.06)


def test_a_stream_is_repeatable_and_its_simulated_holes_change_with_the_epoch(rows):
    def seen(stream):
        return [(sample["image"] is None, sample["text"] is None) for sample in stream]

    data = datasets.IterableDataset.from_generator(lambda: iter(rows))
    fixed, simulated = (with_missing(data, MissingPattern(), PAIR, simulate=simulate) for simulate in (False, True))
    first = seen(fixed), seen(simulated)
    fixed.set_epoch(1), simulated.set_epoch(1)
    assert seen(fixed) == first[0] and seen(simulated) != first[1]


def test_an_empty_sample_of_a_stream_is_left_out(rows):
    stream = (row for row in [rows[1], {"image": NO_PICTURE, "text": ""}, rows[2]])
    assert [sample["label"] for sample in with_missing(stream, MissingPattern(), PAIR)] == [1, 0]
    with pytest.raises(ValueError, match="pass a MissingPattern instead of a table"):
        with_missing(iter(rows), torch.ones(30, 2, dtype=torch.bool), PAIR)


def test_every_form_of_samples_is_read_alike(rows):
    pandas = pytest.importorskip("pandas")
    forms = [rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows), iter(rows), (row for row in rows)]
    for form in forms:
        assert [sample["text"] for batch in batches_of(samples_of(form), 7) for sample in batch] == [
            r["text"] for r in rows
        ]
    assert list(samples_of(pandas.Series(["a", "b"], index=[7, 7]))) == ["a", "b"]


@pytest.mark.parametrize("dataset", ["my.csv", {"train": [], "test": []}, None, 5], ids=str)
def test_splits_and_paths_are_no_data_set(dataset):
    with pytest.raises(TypeError, match=r"is no data set: pass one of its splits, or load_table\(path\)"):
        with_missing(dataset, MissingPattern(), PAIR)


def test_a_frame_gets_holes_too(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    assert torch.equal(
        with_missing(frame, MissingPattern(), PAIR).table, with_missing(rows, MissingPattern(), PAIR).table
    )


# ------------------------------------------------------------------------------------------------------------- tables
def test_a_table_is_decoded_on_demand_and_its_own_rows_are_named(tmp_path, picture, caplog):
    for name in ("0.png", "1.png"):
        picture.save(tmp_path / name)
    (tmp_path / "2.png").write_bytes(NO_PICTURE)
    lines = ["0.png,a,x", "2.png,,x", "1.png,b,y", "2.png,c,y", ",,x"] * 8
    (tmp_path / "t.csv").write_text("image,text,label\n" + "\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        splits = load_table(tmp_path / "t.csv", decode=True)
    kept = [row for part in splits.values() for row in part]
    assert len(kept) == 24 and sum(row["image"] is None for row in kept) == 8
    assert "16 of 40 image cells cannot be decoded and count as absent (rows 2, 4, 7, 9, 12 and 11 more)" in caplog.text
    assert "16 of 40 rows have nothing that can be read (rows 2, 5, 7, 10, 12 and 11 more)" in caplog.text
    whole = load_table(tmp_path / "t.csv", decode=True, keep_empty=True)
    assert sum(map(len, whole.values())) == 40
    as_split = {row["text"] for row in load_table(tmp_path / "t.csv")["test"] if row["text"]}
    assert as_split == {row["text"] for row in splits["test"] if row["text"]}


def test_a_table_of_nothing_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("image,text,label\n,,x\n, ,y\n")
    with pytest.raises(ValueError, match=r"t\.csv has no row with anything that can be read"):
        load_table(tmp_path / "t.csv", decode=True)


def test_pictures_of_one_channel_reach_an_encoder_of_one_channel(tokenizer):
    from transformers import ViTImageProcessor

    grey = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    colour = ViTImageProcessor(size={"height": 8, "width": 8})
    forms = [Image.new("L", (9, 9), 70), np.full((9, 9), 70, np.uint8), np.full((9, 9, 1), 70, np.uint8),
             np.full((1, 9, 9), 70, np.uint8), Image.new("RGB", (9, 9), (70, 70, 70))]  # fmt: skip
    for processor, channels in ((grey, 1), (colour, 3)):
        pixels = MultimodalCollator({"image": processor})([{"image": form} for form in forms])["image"]["pixel_values"]
        assert pixels.shape == (5, channels, 8, 8) and (pixels == pixels[:1]).all()


def test_a_sample_that_is_no_row_is_refused():
    with pytest.raises(TypeError, match=r"row 1 is 'a': write it as \{\"image\": \.\., \"text\": \.\.\}"):
        with_missing(["a", "b"], MissingPattern(), ("image", "text"))
