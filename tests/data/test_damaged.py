"""Files cut, altered or written in odd ways: what can be decoded is, the rest is a DecodeError and nothing else."""

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from u2a_fast.data import MultimodalCollator
from u2a_fast.data.inputs import DecodeError, to_audio, to_image

soundfile = pytest.importorskip("soundfile")

FEW = settings(max_examples=120, deadline=None, derandomize=True, database=None)
RATE = 16_000
TONE = np.sin(np.arange(4000) * 2 * np.pi * 440 / RATE).astype(np.float32) * 0.5


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def recorded(form, subtype=None, samples=TONE, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def turned(orientation, **tags):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return exif


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
PICTURES = {
    **{form: encoded(NOISE, form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA")},
    "palette": encoded(NOISE.convert("P"), "PNG"),
    "turned": encoded(NOISE, "JPEG", exif=turned(6)),
    **({"AVIF": encoded(NOISE, "AVIF")} if features.check("avif") else {}),
}
CLIPS = {
    **{form: recorded(form) for form in ("WAV", "FLAC", "OGG", "AU", "AIFF", "CAF")},
    **{name: recorded("WAV", name) for name in ("GSM610", "IMA_ADPCM", "ULAW", "PCM_U8")},
    "G721": recorded("AU", "G721_32"),
}


@st.composite
def damaged(draw, files):
    """A file of any kind with bytes altered, cut off or put in."""
    content = bytearray(files[draw(st.sampled_from(sorted(files)))])
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(content) - 1) | st.integers(0, min(80, len(content) - 1)))
        content[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    if draw(st.booleans()):
        place = draw(st.integers(0, len(content)))
        content[place:place] = draw(st.binary(max_size=12))
    return bytes(content)


@pytest.mark.slow
@FEW
@given(damaged(PICTURES) | st.binary(max_size=200))
def test_a_damaged_picture_is_decoded_or_a_decode_error(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = to_image(content)
        except DecodeError as error:
            assert str(error) and "<_io" not in str(error)
        else:
            assert image.mode == "RGB" and image.width == image.height


@pytest.mark.slow
@FEW
@given(damaged(CLIPS) | st.binary(max_size=200))
def test_a_damaged_recording_is_decoded_or_a_decode_error(content):
    try:
        clip = to_audio(content, RATE)
    except DecodeError as error:
        assert str(error)
    else:
        assert clip.dtype == np.float32 and clip.ndim == 1 and np.isfinite(clip).all()


@pytest.mark.parametrize("name", CLIPS)
def test_every_kind_of_recording_is_heard(name):
    clip = to_audio(CLIPS[name], RATE)
    tone = np.abs(np.fft.rfft(clip[:4000]))
    assert tone.argmax() * RATE / min(len(clip), 4000) == pytest.approx(440, abs=5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_as_pillow_does_it(orientation):
    from PIL import ImageOps

    content = encoded(NOISE, "PNG", exif=turned(orientation))
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(to_image(content)), np.asarray(to_image(plain.copy())))


def with_tag(tag, kind, value, orientation=6):
    """A JPEG whose EXIF holds an orientation and a tag of the wrong type."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, orientation) + struct.pack("<HHI4s", tag, kind, 1, value)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    return encoded(NOISE, "JPEG", exif=exif)


@pytest.mark.parametrize("tag", [0x010F, 0x011A, 0x0128, 0x0131, 0x0132, 0x8769, 0x8825, 0xA005, 0x02BC])
@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 7, 9, 10, 12, 13, 99])
def test_a_tag_of_a_wrong_type_costs_neither_pixels_nor_orientation(tag, kind):
    image = to_image(with_tag(tag, kind, b"\xff\x01\xfe\x02"))
    assert np.array_equal(np.asarray(image), np.asarray(to_image(encoded(NOISE, "JPEG")).rotate(-90)))


@pytest.mark.parametrize(("dtype", "middle"), [(np.uint8, 128), (np.uint16, 2**15), (np.uint32, 2**31)])
def test_unsigned_samples_lie_around_their_middle(dtype, middle):
    clip = to_audio((TONE * middle + middle).astype(dtype), RATE)
    np.testing.assert_allclose(clip, TONE / np.abs(TONE).max(), atol=0.02)


NO_CLIPS = {
    "ragged": [[1.0], [1.0, 2.0]],
    "texts": ["a", "b"],
    "nothing": [None],
    "objects": [object()],
    "four axes": [[[[1.0]]]],
    "no samples": np.zeros((0, 2)),
}


@pytest.mark.parametrize("clip", NO_CLIPS.values(), ids=NO_CLIPS)
def test_arrays_of_no_clip_are_a_decode_error(clip):
    for value in (clip, {"array": clip, "sampling_rate": RATE}):
        with pytest.raises(DecodeError):
            to_audio(value, RATE)


@pytest.mark.parametrize("length", [1, 2, 10, 100, 399, 400, 401])
def test_clips_of_any_length_pass_through_every_extractor(length):
    from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    extractors = (
        ASTFeatureExtractor(num_mel_bins=16, max_length=32),
        WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    )
    for extractor in (*extractors, Wav2Vec2FeatureExtractor()):
        batch = MultimodalCollator({"audio": extractor})([{"audio": TONE[:length]}, {"audio": None}])
        assert batch["modality_mask"].tolist() == [[True], [False]]
        assert all(tensor.isfinite().all() for tensor in batch["audio"].values())


def test_more_pixels_than_anyone_takes_are_refused_before_they_are_read():
    header = encoded(Image.new("L", (8, 8)), "PNG")
    content = header[:16] + struct.pack(">II", 13_000, 13_000) + header[24:]
    import zlib

    content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
    with warnings.catch_warnings(), pytest.raises(DecodeError, match="13000 x 13000 pixels are too many"):
        warnings.simplefilter("ignore")
        to_image(content)


# --------------------------------------------------------------------------------------------------- optional packages
def test_heic_pictures_are_read_with_pillow_heif():
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (40, 20), (200, 30, 30))).save(file, quality=95)
    assert np.asarray(to_image(file.getvalue()))[20, 20] == pytest.approx([200, 30, 30], abs=6)


def test_a_film_without_sound_is_no_recording_in_a_sentence(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(DecodeError, match="there is no recording in it"):
        to_audio(str(tmp_path / "a.mp4"), RATE)


def test_m4a_recordings_are_read_with_av(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        for start in range(0, 3072, 1024):
            frame = av.AudioFrame.from_ndarray(TONE[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for value in (str(tmp_path / "a.m4a"), (tmp_path / "a.m4a").read_bytes()):
        clip = to_audio(value, RATE)
        assert np.abs(np.fft.rfft(clip)).argmax() * RATE / len(clip) == pytest.approx(440, abs=10)


@pytest.mark.parametrize(("module", "read", "package"), [("pillow_heif", to_image, "pillow-heif"),
                                                         ("av", lambda file: to_audio(file, RATE), "av")])  # fmt: skip
def test_without_the_package_the_message_names_it(module, read, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(DecodeError, match=rf"is read with {package}: `pip install {package}`"):
        read(b"\0\0\0\x18ftypM4A \0\0\0\0" + bytes(100))
