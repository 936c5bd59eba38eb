import io

import numpy as np
import pytest
import torch
from PIL import Image, features

from u2a_fast.data import inputs
from u2a_fast.data.inputs import DecodeError, is_absent, to_audio, to_image, to_video

PNG = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(PNG, "png")
PNG = PNG.getvalue()


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), np.float32("nan"), "", "  \n", {"path": None, "bytes": None}, {"bytes": None}, {}],
    ids=repr,
)
def test_nothing_is_absent(value):
    assert is_absent(value)


@pytest.mark.parametrize(
    "value",
    ["a", "nan", 0, 0.0, b"", {"path": "x", "bytes": None}, {"array": np.zeros(0)}, np.zeros(2), torch.tensor(1.0)],
    ids=repr,
)
def test_something_is_present(value):
    assert not is_absent(value)


def test_pandas_own_missing_values_are_absent():
    pandas = pytest.importorskip("pandas")
    assert is_absent(pandas.NA)
    assert is_absent(pandas.NaT)


@pytest.mark.parametrize("form", ["path", "Path", "bytes", "record of bytes", "record of a path", "PIL", "array"])
def test_an_image_may_come_in_any_form(tmp_path, form):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    value = {
        "path": str(path),
        "Path": path,
        "bytes": PNG,
        "record of bytes": {"path": "elsewhere.png", "bytes": PNG},
        "record of a path": {"path": str(path), "bytes": None},
        "PIL": Image.open(path),
        "array": np.full((4, 4, 3), (255, 0, 0), np.uint8),
    }[form]
    image = to_image(value)
    assert (image.mode, image.size, image.getpixel((1, 1))) == ("RGB", (4, 4), (255, 0, 0))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV",
                                  "I;16", "I"])  # fmt: skip
def test_an_image_may_have_any_mode(mode):
    image = to_image(Image.new(mode, (5, 3)))
    assert (image.mode, image.size) == ("RGB", (5, 5))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_become_white_and_half_transparent_ones_light(mode):
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 128))
    image.putpixel((2, 2), (0, 0, 0, 255))
    flat = to_image(image.convert(mode))
    assert [flat.getpixel((index, index))[0] for index in range(3)] == pytest.approx([255, 127, 0], abs=1)


def test_the_transparent_colour_of_a_palette_becomes_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    image.info["transparency"] = 0
    assert to_image(image).getpixel((1, 1)) == (255, 255, 255)
    assert to_image(image).getpixel((0, 0)) == (40, 50, 60)


def test_colours_of_a_palette_may_be_transparent():
    image = Image.new("RGBA", (4, 4), (200, 30, 30, 0)).quantize(2)
    assert image.mode == "P" and "transparency" not in image.info
    assert to_image(image).getpixel((0, 0)) == (255, 255, 255)


def test_padding_is_white_and_on_both_sides():
    square = np.asarray(to_image(Image.new("RGB", (2, 6))))
    assert square[:, :, 0].tolist() == [[255, 255, 0, 0, 255, 255]] * 6


def test_sixteen_bit_images_keep_their_shades():
    shades = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    assert np.asarray(to_image(Image.fromarray(shades)))[:, :, 0].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize(("dtype", "top"), [(np.int32, 65535), (np.int32, 255), (np.uint8, 255)])
def test_integer_pictures_keep_their_shades_whatever_their_range(dtype, top):
    shades = (np.array([[0, 100], [200, 255]]) * (top // 255)).astype(dtype)
    assert np.asarray(to_image(Image.fromarray(shades)))[:, :, 0].tolist() == [[0, 100], [200, 255]]


def test_integers_out_of_range_are_black_or_white():
    shades = np.array([[-5, 70_000]], np.int32)
    assert np.asarray(to_image(Image.fromarray(shades)))[0, :, 0].tolist() == [0, 255]


def test_a_picture_of_floats_is_refused_in_a_sentence():
    with pytest.raises(DecodeError, match="mode F does not say which number is white"):
        to_image(Image.new("F", (2, 2)))


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_an_array_may_have_any_usual_number_of_channels(channels):
    pixels = np.full((3, 3, *channels), 255, np.uint8)
    pixels[1, 1] = (9, 9, 9, 255)[: channels[0]] if channels else 9
    assert np.asarray(to_image(pixels))[:, :, 0].tolist() == [[255] * 3, [255, 9, 255], [255] * 3]


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 5), (8,), (2, 8, 8, 3)])
def test_an_array_of_another_shape_is_refused_in_a_sentence(shape):
    with pytest.raises(ValueError, match=r"must be \[H, W\]") as caught:
        to_image(np.zeros(shape, np.uint8))
    assert not isinstance(caught.value, DecodeError)


@pytest.mark.parametrize("value", [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0), np.uint8), Image.new("RGB", (0, 0))])
def test_a_picture_without_a_pixel_is_a_decode_error(value):
    with pytest.raises(DecodeError, match="pixels is empty"):
        to_image(value)


@pytest.mark.parametrize("size", [(16000, 10), (10, 60000), (5000, 4000)])
def test_a_picture_with_a_long_side_is_shrunk_before_its_square_is_made(size):
    file = io.BytesIO()
    Image.new("L", size, 200).save(file, "png")
    square = to_image(file.getvalue())
    assert square.size == (4096, 4096) and square.getpixel((2047, 2047)) == (200, 200, 200)


def test_a_camera_that_was_turned_is_turned_back():
    image = Image.new("RGB", (2, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    assert to_image(file.getvalue()).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("content", [b"", b"nonsense", PNG[:40], PNG[:-20]], ids=["empty", "nonsense", "head", "cut"])
def test_broken_pictures_are_a_decode_error(content):
    with pytest.raises(DecodeError):
        to_image(content)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_a_damaged_avif_is_a_decode_error():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, "avif")
    with pytest.raises(DecodeError):
        to_image(file.getvalue()[:-200])


def test_files_that_do_not_exist_are_a_decode_error(tmp_path):
    pytest.importorskip("soundfile")
    with pytest.raises(DecodeError):
        to_image(str(tmp_path / "none.png"))
    with pytest.raises(DecodeError):
        to_audio(str(tmp_path / "none.ogg"), 16000)


@pytest.mark.parametrize("value", [3, [1, 2], np.zeros((4, 4, 3), np.float32), {"array": np.zeros(3)}], ids=repr)
def test_what_is_no_picture_at_all_is_a_mistake_of_the_caller(value):
    with pytest.raises(TypeError, match=r"image"):
        to_image(value)


@pytest.mark.parametrize(
    "read", [to_image, lambda cell: to_audio(cell, 16000), to_video], ids=["image", "audio", "video"]
)
@pytest.mark.parametrize("content", ["path", 5, ["path"]])
def test_what_stands_under_bytes_is_never_opened(read, content, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    message = 'holds a string under "bytes": write the content itself' if content == "path" else "column holds the dict"
    with pytest.raises(TypeError, match=message):
        read({"path": path, "bytes": path if content == "path" else content})


def write_clip(path, samples, rate):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


FORMS = ["path", "bytes", "record", "array", "tensor", "tensor with a gradient", "bf16 tensor", "array record", "list"]


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_may_come_in_any_form(tmp_path, clip, form):
    path = write_clip(tmp_path / "a.wav", clip, 16000) if form in ("path", "bytes", "record") else None
    value = {
        "path": lambda: str(path),
        "bytes": lambda: path.read_bytes(),
        "record": lambda: {"path": str(path), "bytes": None},
        "array": lambda: clip,
        "tensor": lambda: torch.from_numpy(clip),
        "tensor with a gradient": lambda: torch.from_numpy(clip).requires_grad_(),
        "bf16 tensor": lambda: torch.from_numpy(clip).bfloat16(),
        "array record": lambda: {"array": clip, "sampling_rate": 16000, "path": None},
        "list": lambda: clip.tolist(),
    }[form]()
    samples = to_audio(value, 16000)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, clip / np.abs(clip).max(), atol=1e-2 if form == "bf16 tensor" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [5000, 8000, 11025, 22050, 44100, 48000])
def test_clips_are_resampled_to_the_same_tone(rate):
    pytest.importorskip("scipy")
    tone = np.sin(np.arange(rate) * 2 * np.pi * 440 / rate)
    samples = to_audio({"array": tone, "sampling_rate": rate}, 16000)
    assert len(samples) == 16000
    assert np.abs(np.fft.rfft(samples)).argmax() == 440


@pytest.mark.parametrize("rate", [..., None, 0, -1, float("nan"), float("inf")], ids=str)
def test_an_array_without_its_rate_is_refused_in_a_sentence(rate):
    clip = {"array": np.ones(100)} | ({} if rate is ... else {"sampling_rate": rate})
    with pytest.raises(ValueError, match="needs its sampling_rate, in samples a second, not") as caught:
        to_audio(clip, 16000)
    assert not isinstance(caught.value, DecodeError)


def flac_header(frames=8000, rate=16000):
    """The start of a mono FLAC file of 16 bits: sizes of blocks, then rate, channels, bits and frames in 64 bits."""
    sizes = (4096).to_bytes(2) * 2 + bytes(6)
    return b"fLaC\x80\x00\x00\x22" + sizes + (rate << 44 | 15 << 36 | frames).to_bytes(8) + bytes(16)


@pytest.mark.parametrize("claim", [{"frames": 2**36 - 1}, {"rate": 1}, {"rate": 1_000_000}], ids=str)
def test_a_recording_whose_header_claims_too_much_is_a_decode_error_and_takes_no_memory(claim, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.setattr(inputs, "MOST_SAMPLES", 10**8)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(DecodeError, match="are too many"):
        to_audio(flac_header(**claim), 16000)


@pytest.mark.parametrize("layout", ["samples first", "channels first"])
def test_channels_are_averaged(clip, layout):
    stereo = np.stack([clip, np.zeros_like(clip)], axis=1 if layout == "samples first" else 0)
    np.testing.assert_allclose(to_audio(stereo, 16000), clip / np.abs(clip).max(), atol=1e-6)


@pytest.mark.parametrize("frames", [1, 3])
def test_channels_of_a_file_are_averaged_where_they_are_more_than_its_samples(tmp_path, frames):
    path = write_clip(tmp_path / "a.wav", np.linspace(-1, 1, 8) * np.ones((frames, 8)) + 0.5, 16000)
    assert to_audio(str(path), 16000).tolist() == pytest.approx([1] * frames)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30000])
def test_the_peak_is_one(clip, scale):
    assert np.abs(to_audio(clip * scale, 16000)).max() == pytest.approx(1)
    assert np.abs(to_audio((clip * 30000).astype(np.int16), 16000)).max() == pytest.approx(1)


def test_silence_stays_silence():
    assert to_audio(np.zeros(100), 16000).tolist() == [0] * 100


@pytest.mark.parametrize(
    "value", [np.zeros(0), np.array([0, np.nan]), np.zeros((2, 2, 2)), np.array([np.inf]), b"nonsense"], ids=repr
)
def test_clips_of_nothing_are_a_decode_error(value):
    pytest.importorskip("soundfile")
    with pytest.raises(DecodeError):
        to_audio(value, 16000)


def test_without_soundfile_there_is_a_sentence_and_no_absent_clip(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'u2a-fast\[demo\]'"):
        to_audio("a.ogg", 16000)


@pytest.mark.parametrize(("most", "white"), [(255, 255), (4095, 255), (4096, 15)])
def test_sixteen_bits_hold_the_shades_of_eight_or_twelve(most, white):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, most]], np.uint16)).save(file, "png")
    assert np.asarray(to_image(file.getvalue(), square=False))[..., 0].tolist() == [[0, white]]


def test_the_transparent_shade_of_sixteen_bits_is_white():
    shades, file = np.full((8, 8), 0xC800, np.uint16), io.BytesIO()
    shades[0] = 0x1000
    Image.fromarray(shades).save(file, "PNG", transparency=0xC800)
    picture = np.asarray(to_image(file.getvalue()))
    assert (picture[1:] == 255).all() and (picture[0] == 0x1000 // 257).all()
