"""Videos in any form: as many frames as the encoder takes, evenly spaced; what cannot be read is absent."""

import io
import json
import logging
import struct

import av
import datasets
import numpy as np
import pytest
import tiny_configs
import tiny_data
import torch
import transformers
from PIL import Image
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from u2a_fast import U2A, LateFusion, load_model
from u2a_fast.cli import main
from u2a_fast.data import MultimodalCollator, load_table, readable
from u2a_fast.data.inputs import DecodeError, evenly, to_video
from u2a_fast.data.presence import undecoded, warn_of_cuts
from u2a_fast.options import TrainOptions, default_encoders

SHADES = [0, 30, 60, 90, 120, 150, 180, 210]
SIDE = 24


def processor_of(frames=4):
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    if frames is not None:
        processor.num_frames = frames
    return processor


def still(shade, size=(20, 20)):
    return Image.new("RGB", size, (shade,) * 3)


def shades_of(pictures):
    """The grey in the middle of each picture, to within what a lossy codec does."""
    return [picture.getpixel((picture.width // 2, picture.height // 2))[0] for picture in pictures]


def close(got, expected):
    return len(got) == len(expected) and all(abs(a - b) <= 4 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("count", "frames", "expected"), [
    (8, 4, [0, 2, 4, 6]), (8, 8, list(range(8))), (1, 4, [0] * 4), (3, 4, [0, 0, 1, 2]), (9, 2, [0, 4]), (5, 1, [0]),
])  # fmt: skip
def test_frames_are_evenly_spaced_and_repeated_where_there_are_few(count, frames, expected):
    assert evenly(count, frames) == expected
    assert close(shades_of(to_video([still(20 * i) for i in range(count)], frames)), [20 * i for i in expected])


def test_frames_are_those_that_transformers_takes():
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    for count, frames in ((16, 16), (17, 16), (100, 16), (9, 4)):
        theirs = default_sample_indices_fn(VideoMetadata(total_num_frames=count, fps=10.0), num_frames=frames)
        assert evenly(count, frames) == list(theirs)


# ------------------------------------------------------------------------------------------------------------- forms
def forms(tmp_path):
    pictures = [still(shade) for shade in SHADES]
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    names = [tmp_path / f"{i}.png" for i in range(len(SHADES))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(name)
    clip = tiny_data.clip_file(SHADES)
    (tmp_path / "clip.mp4").write_bytes(clip)
    return {
        "pictures": pictures,
        "a tuple": tuple(pictures),
        "arrays": list(pixels),
        "one array": pixels,
        "a tensor": torch.from_numpy(pixels),
        "grey": pixels[..., :1],
        "paths of frames": [str(name) for name in names],
        "records of frames": [{"path": None, "bytes": name.read_bytes()} for name in names],
        "with holes": [pictures[0], None, *pictures[1:4], float("nan"), *pictures[4:]],
        "a path": tmp_path / "clip.mp4",
        "a name": str(tmp_path / "clip.mp4"),
        "bytes": clip,
        "a record": {"path": "gone.mp4", "bytes": clip},
        "a record with its path": {"path": str(tmp_path / "clip.mp4"), "bytes": None},
    }


def test_a_video_may_come_in_any_form(tmp_path):
    for name, form in forms(tmp_path).items():
        pictures = to_video(form, 4)
        assert close(shades_of(pictures), [0, 60, 120, 180]), name
        assert {(picture.mode, picture.width) for picture in pictures} <= {("RGB", 20), ("RGB", 64)}, name
        assert all(picture.width == picture.height for picture in pictures), name


FORMS = [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mov", "png"), ("gif", None)]


@pytest.mark.parametrize(("form", "codec"), FORMS)
@pytest.mark.parametrize("count", [1, 3, 8, 30])
def test_files_of_any_container_and_length_are_read(form, codec, count):
    shades = [8 * i for i in range(count)]
    if form == "gif":
        file, (first, *others) = io.BytesIO(), map(still, shades)
        first.save(file, "GIF", save_all=True, append_images=others, duration=100)
        content = file.getvalue()
    else:
        content = tiny_data.clip_file(shades, form=form, codec=codec)
    assert close(shades_of(to_video(content, 4)), [shades[i] for i in evenly(count, 4)])


def test_a_camera_that_was_turned_is_turned_back():
    """The matrix in the track's header of an MP4 file, as telephones write it."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255  # white on the left
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(file.getvalue())
    at = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    content[at : at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 32 << 16, 0, 1 << 30)  # a quarter clockwise
    (upright,) = to_video(bytes(content), 1)
    assert upright.size == (64, 64)
    assert upright.getpixel((32, 8))[0] > 200 and upright.getpixel((32, 56))[0] < 50  # white on top
    assert upright.getpixel((4, 32)) == (255, 255, 255)  # beside it, what makes it a square


# ------------------------------------------------------------------------------------------------------ what is broken
CLIP, BRIGHT = (tiny_data.clip_file(shades) for shades in (range(0, 240, 8), [255]))
BROKEN = {
    "no video": b"nonsense",
    "nothing": b"",
    "its end is gone": CLIP[:200],
    "its frames are noise": CLIP[:60] + bytes(len(CLIP) - 60),
    "a missing file": "/nowhere/clip.mp4",
    "a folder": "/tmp",
    "an address": "http://127.0.0.1:9/clip.mp4",
    "no frames": [],
    "holes alone": [None, None],
    "a broken frame": [b"\x89PNG nonsense"],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_a_decode_error(content):
    with pytest.raises(DecodeError):
        to_video(content, 4)


def test_a_recording_is_no_video():
    soundfile = pytest.importorskip("soundfile")
    file = io.BytesIO()
    soundfile.write(file, np.zeros(800), 16_000, format="wav")
    with pytest.raises(DecodeError, match="there is no video in it"):
        to_video(file.getvalue(), 4)


def test_a_file_that_ends_early_gives_the_frames_that_it_has():
    content = tiny_data.clip_file(range(0, 240, 8), form="matroska")
    pictures = to_video(content[: len(content) * 2 // 3], 4)
    shades = shades_of(pictures)
    assert shades == sorted(shades) and 60 < shades[-1] < 180  # of the first two thirds, evenly


def test_a_picture_too_large_is_not_decoded(monkeypatch):
    monkeypatch.setattr("u2a_fast.data.inputs.MOST_PIXELS", 1000)
    with pytest.raises(DecodeError, match="64 x 32 pixels are too many"):
        to_video(CLIP, 4)


@pytest.mark.parametrize(("value", "error", "message"), [
    (np.zeros((4, 8, 8), np.uint8), ValueError, r"a video array must be \[frames, H, W, channels\], not \[4, 8, 8\]"),
    (np.zeros((4, 8, 8, 3), np.float32), TypeError, "must be uint8"),
    (3, TypeError, r"the video column holds the int 3; .*Video\(decode=False\)"),
])  # fmt: skip
def test_what_is_no_video_at_all_is_a_mistake_of_the_caller(value, error, message):
    with pytest.raises(error, match=message):
        to_video(value, 4)


def test_without_pyav_there_is_a_sentence_and_no_absent_video(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    message = r"videos are read with PyAV \(the package `av`\); get it with `pip install 'u2a-fast\[media\]'`"
    with pytest.raises(ModuleNotFoundError, match=message):
        MultimodalCollator({"video": processor_of()})([{"video": CLIP}])
    assert len(to_video([still(3)], 4)) == 4  # pictures need none


# ----------------------------------------------------------------------------------------------------------- collator
def test_batches_are_what_the_processor_makes_of_the_frames(tmp_path):
    collate = MultimodalCollator({"video": processor_of()})
    pictures = [still(shade) for shade in SHADES]
    batch = collate([{"video": pictures}, {"video": None}, {"video": CLIP}, {"video": pictures[:1]}, {"video": b"no"}])
    assert batch["modality_mask"].tolist() == [[True], [False], [True], [True], [False]]
    pixels = batch["video"]["pixel_values"]
    assert pixels.shape == (5, 4, 3, SIDE, SIDE) and not pixels[[1, 4]].any()
    expected = processor_of()([pictures[::2]], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[:1], expected)
    assert all(torch.equal(frame, pixels[3, 0]) for frame in pixels[3])
    assert collate.undecodable == {"video": 1} and not collate.cut
    empty = collate([{"video": None}])["video"]["pixel_values"]
    assert empty.shape == (1, 4, 3, SIDE, SIDE) and not empty.any()


def test_sixteen_frames_where_nobody_says_how_many():
    assert MultimodalCollator({"video": processor_of(None)})([{"video": CLIP}])["video"]["pixel_values"].shape[1] == 16


def test_videos_may_have_any_name():
    collate = MultimodalCollator({"film": processor_of(), "caption": tiny_data.tokenizer()})
    assert collate.kinds == {"film": "video", "caption": "text"}
    assert collate([{"film": CLIP, "caption": "red"}])["modality_mask"].tolist() == [[True, True]]


def test_a_cache_gives_the_same_batches_and_knows_the_number_of_frames(tmp_path):
    cells = [CLIP, [still(shade) for shade in SHADES], [still(9), still(9, (30, 10))], None, b"no"]
    samples = [{"video": cell} for cell in cells]
    for frames in (4, 2):
        expected = MultimodalCollator({"video": processor_of(frames)})(samples)
        for _ in range(2):
            got = MultimodalCollator({"video": processor_of(frames)}, cache=tmp_path)(samples)
            assert torch.equal(got["video"]["pixel_values"], expected["video"]["pixel_values"])
            assert torch.equal(got["modality_mask"], expected["modality_mask"])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 * 3


def test_presence_is_decided_by_decoding(caplog):
    samples = [{"video": CLIP}, {"video": b"no"}, {"video": None}, {"video": [still(3)]}]
    with caplog.at_level(logging.WARNING):
        assert readable(samples, ("video",)).flatten().tolist() == [True, False, False, True]
    assert "1 of 4 video cells cannot be decoded and count as absent (rows 2)" in caplog.text
    warn_of_cuts({"video": processor_of()}, samples)  # frames are left out, and nothing is cut


# -------------------------------------------------------------------------------------------------------------- models
def video_mae(**sizes):
    config = {"num_frames": 4, "tubelet_size": 2, "image_size": SIDE, "patch_size": 8, **tiny_configs.LAYERS, **sizes}
    torch.manual_seed(0)
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**config)).eval()


def test_predict_takes_videos_and_says_what_the_encoder_says(tmp_path):
    theirs = video_mae()
    model = LateFusion({"video": theirs}, 3, lora=None, processors={"video": processor_of(None)}).eval()
    assert model.processors["video"].num_frames == 4
    pictures = [still(shade) for shade in SHADES]
    pixels = processor_of()([pictures[::2]], return_tensors="pt")["pixel_values"]
    expected = model.head(theirs(pixels).last_hidden_state.mean(dim=1))
    torch.testing.assert_close(model.predict([{"video": pictures}]), expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    path = str(tmp_path / "clip.mp4")
    assert torch.equal(model.predict([path]), model.predict([{"video": CLIP}]))


@pytest.mark.slow
def test_a_video_encoder_and_its_processor_load_from_folders_and_train(tmp_path):
    folders = tiny_data.encoder_folders(tmp_path)
    folders["video"] = str(tmp_path / "encoders" / "video")
    video_mae().save_pretrained(folders["video"])
    processor_of(None).save_pretrained(folders["video"])
    samples = [{**row, "video": None if i % 3 else CLIP} for i, row in enumerate(tiny_data.samples(6))]
    model = U2A(folders, num_labels=3)
    loss = model.train()(**MultimodalCollator(model.processors)(samples)).loss
    loss.backward()
    assert loss.isfinite() and model.mask_tokens["video"].grad.abs().sum() > 0
    expected = model.eval().predict(samples)
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.processors["video"].num_frames == 4
    torch.testing.assert_close(loaded.predict(samples), expected, atol=1e-6, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------------- tables
def write_table(folder, rows):
    (folder / "clips").mkdir()
    for number, row in enumerate(rows):
        if isinstance(row.get("video"), bytes):
            (folder / "clips" / f"{number}.mp4").write_bytes(row["video"])
            row["video"] = f"clips/{number}.mp4"
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "all.jsonl"


@pytest.mark.slow
def test_a_table_may_have_a_column_of_videos(tmp_path, caplog):
    rows = [{"video": CLIP, "text": f"red {i}", "label": "ab"[i % 2]} for i in range(12)]
    rows[3]["video"], rows[5]["video"], rows[7]["video"] = b"no", "", "clips/gone.mp4"
    with caplog.at_level(logging.WARNING):
        data = load_table(write_table(tmp_path, rows), decode=True)
    assert "1 of 12 video cells cannot be decoded" in caplog.text and "1 of 11 video files do not exist" in caplog.text
    train = data["train"]
    assert train.column_names == ["text", "video", "label"]
    cells = [cell for part in data.values() for cell in part["video"]]
    assert sum(cell is None for cell in cells) == 3
    batch = MultimodalCollator({"video": processor_of(), "text": tiny_data.tokenizer()})(list(train))
    assert batch["modality_mask"][:, 0].tolist() == [cell is not None for cell in train["video"]]


def test_a_list_of_frames_in_a_table_is_refused_with_the_cure(tmp_path):
    table = write_table(tmp_path, [{"video": ["a.png", "b.png"], "label": "a"}])
    with pytest.raises(ValueError, match="row 1, column video: holds 2 files: write the file of one clip"):
        load_table(table)


def test_data_sets_of_hugging_face_leave_decoding_to_us(tmp_path):
    path = str(tmp_path / "clip.mp4")
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    features = datasets.Features({"video": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")}})
    data = datasets.Dataset.from_list([{"video": {"path": path, "bytes": None}}], features=features)
    data = undecoded(data.cast_column("video", datasets.Video()))
    assert MultimodalCollator({"video": processor_of()})([data[0]])["modality_mask"].tolist() == [[True]]


@pytest.mark.slow
def test_the_command_line_trains_evaluates_and_predicts(tmp_path, capsys):
    folders = tiny_data.encoder_folders(tmp_path)
    encoders = {"video": str(tmp_path / "encoders" / "video"), "text": folders["text"]}
    video_mae().save_pretrained(encoders["video"])
    processor_of(None).save_pretrained(encoders["video"])
    words = ("red", "blue")
    rows = [{"video": CLIP if i % 2 else BRIGHT, "text": words[i % 2], "label": words[i % 2]} for i in range(24)]
    rows[4]["video"], rows[6]["text"] = b"no", ""
    (tmp_path / "table").mkdir()
    table, out = str(write_table(tmp_path / "table", rows)), tmp_path / "out"
    given = ["--data", table, "--encoders", json.dumps(encoders), "--output-dir", str(out)]
    main(["train", *given, "--max-steps", "2", "--batch-size", "4", "--data-cache", str(tmp_path / "cache")])
    main(["evaluate", "--model", str(out), "--data", table])
    (tmp_path / "new.jsonl").write_text('{"video": "table/clips/1.mp4"}\n{"text": "red"}\n{"video": "gone.mp4"}\n')
    capsys.readouterr()
    main(["predict", "--model", str(out), "--input", str(tmp_path / "new.jsonl")])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer.get("label") in words for answer in answers] == [True, True, False]
    assert "video missing" in (out / "report.csv").read_text()


def test_without_an_encoder_a_column_of_videos_is_left_out_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr("u2a_fast.data.minilm_folder", lambda: "minilm")
    splits = {"train": datasets.Dataset.from_list([{"video": "a.mp4", "text": "red"}])}
    with caplog.at_level(logging.WARNING):
        assert default_encoders(TrainOptions(), splits) == {"text": "minilm"}
    assert "the column video is left out: name one in --encoders" in caplog.text
