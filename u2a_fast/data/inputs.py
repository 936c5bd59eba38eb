"""One cell of a table as what a processor takes: a square RGB picture, a mono clip at a given rate, a text, or so many
frames of a video.
"""

from __future__ import annotations

import contextlib
import io
import math
import numbers
import reprlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .packages import DecodeError, needed, optional
from .spelling import UNSEEN

if TYPE_CHECKING:
    from PIL import Image

LONGEST_SIDE = 4096  # of a picture; the square around a thin one would take gigabytes
MOST_PIXELS = 2**27  # half a gigabyte in RGBA

# What the header of a damaged recording claims beyond these is not believed, and nothing is allocated for it.
MOST_SAMPLES = 2**29  # 2 GiB of float32, 9 hours at 16 kHz
HIGHEST_RATE = 768_000

FRAMES = 16  # of a video, for processors that state no number: VideoMAE's

KINDS = ("image", "text", "audio", "video")
RECORDINGS = "recordings are read with soundfile and SciPy"
ORIENTATION = 0x0112  # the EXIF tag


def is_absent(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, a string of nothing visible, or a record with neither path nor content.

    >>> [is_absent(value) for value in (None, float("nan"), " ", {"path": None, "bytes": None}, "a.png", 0)]
    [True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return not UNSEEN.sub("", value).strip()
    if isinstance(value, Mapping):
        return not value.get("path") and all(value[key] is None for key in value.keys() - {"path", "sampling_rate"})
    if isinstance(value, float | np.floating):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # pandas' own, without importing it


def described(value: Any) -> str:
    """A cell for a message: what it is, and its beginning."""
    return f"the {type(value).__name__} {reprlib.repr(value)}"


def read_cell(kind: str, value: Any, rate: int = 16_000, square: bool = True, frames: int = FRAMES) -> Any:
    """What a processor takes of a cell of this kind (image, text, audio or video); None where the cell is absent.

    Args:
        rate: of a clip. square: whether pictures become squares. frames: of a video.

    Raises:
        DecodeError: it cannot be decoded, so that it counts as absent.
        TypeError, ValueError: a value that no column of this kind should hold.
    """
    if is_absent(value):
        return None
    if kind == "image":
        return to_image(value, square)
    if kind == "audio":
        return to_audio(value, rate)
    if kind == "video":
        return to_video(value, frames)
    if not isinstance(value, str):
        raise TypeError(f"holds {described(value)}; a text must be a string")
    # Half of a surrogate pair is no character; tokenizers raise on it.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --------------------------------------------------------------------------------------------------------- pictures
def to_image(value: Any, square: bool = True) -> Image.Image:
    """A picture as an RGB image, a square one or as it is: transparent pixels and the padding are white.

    Takes a path, bytes, {"path", "bytes"}, a PIL image of any mode but F, or an uint8 array [H, W], [1, H, W] or
    [H, W, 1 to 4]. Square, because the centre crop of most processors would cut the ends off anything else.

    Raises:
        DecodeError: a file that cannot be read.
        TypeError: another kind of value.
        ValueError: an array of another shape.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        value = _from_array(value)
    source = value if isinstance(value, Image.Image) else _source(value, "image")
    try:
        if isinstance(source, Image.Image):
            return _on_white(_upright(source), square)
        with _open_image(source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DecodeError(f"{image.width} x {image.height} pixels are too many")
            image.draft(None, (LONGEST_SIDE, LONGEST_SIDE))  # a large JPEG is read at a fraction of its size
            image.load()
            return _on_white(_upright(image), square)
    except DecodeError:
        raise
    except Exception as error:  # decoders raise whatever they trip over, struct.error and IndexError among others
        raise DecodeError(str(error) or type(error).__name__) from error


def _open_image(source: str | Path | io.BytesIO) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(source)
    except UnidentifiedImageError:
        if _start(source)[4:8] != b"ftyp":
            raise DecodeError("this is no picture in a format that Pillow reads") from None
        return optional("pillow_heif", "pillow-heif", "a HEIC picture").open_heif(source).to_pillow()


def _from_array(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    if pixels.dtype != np.uint8:
        raise TypeError(f"an image array must be uint8 (0 to 255), not {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[0] == 1 and pixels.shape[2] > 4:
        pixels = pixels[0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"an image array must be [H, W] or [H, W, channels], not {list(pixels.shape)}; transpose it")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its camera was held. `ImageOps.exif_transpose` writes EXIF anew, and fails on odd tags."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = None
    with contextlib.suppress(Exception):  # whatever is wrong with the tags, the pixels are fine
        turn = turns.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image, square: bool) -> Image.Image:
    from PIL import Image

    if not all(image.size):  # as a crop beside the picture: a white square would be a picture that nobody took
        raise DecodeError(f"a picture of {image.width} x {image.height} pixels is empty")
    if image.mode == "F":
        raise DecodeError("mode F does not say which number is white; convert it to 8 bits (0 to 255)")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip all but the darkest pixels to white. As many bits as the brightest needs,
        # of the 8, 12 and 16 that scanners and cameras give: a picture of fewer would be black.
        shades, clear = np.asarray(image), image.info.get("transparency")
        scale = next(scale for scale, most in ((1, 255), (16, 4095), (257, np.inf)) if shades.max() <= most)
        image = Image.fromarray((shades // scale).clip(0, 255).astype(np.uint8))
        if isinstance(clear, int):  # the one shade that is transparent
            image.putalpha(Image.fromarray(np.where(shades == clear, 0, 255).astype(np.uint8)))
    transparent = image.has_transparency_data
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA" if transparent else "RGB")
    if max(image.size) > LONGEST_SIDE:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    size = (max(image.size),) * 2 if square else image.size
    if not transparent and image.size == size:
        return image
    white = Image.new("RGB", size, "white")
    corner = ((size[0] - image.width) // 2, (size[1] - image.height) // 2)
    white.paste(image, corner, mask=image if transparent else None)
    return white


# ------------------------------------------------------------------------------------------------------- recordings
def to_audio(value: Any, rate: int) -> np.ndarray:
    """A clip as float32 [samples] at `rate` samples a second: mono, resampled, scaled to a peak of 1.

    Takes a path, bytes, {"path", "bytes"}, {"array", "sampling_rate"}, or an array, which is taken to be at `rate`
    already. An array with two axes is averaged over the shorter one; unsigned integers lie around their middle.

    Raises:
        DecodeError: it cannot be read, is empty, or is not finite.
        TypeError: another kind of value.
        ValueError: an array without its rate.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        source, source_rate = value["array"], given_rate(value)
    elif isinstance(value, np.ndarray | list | tuple) or type(value).__name__ == "Tensor":
        source, source_rate = value, rate
    else:
        source, source_rate = _source(value, "audio"), None
    try:
        samples, source_rate = _read_clip(source, rate) if source_rate is None else (_as_float(source), source_rate)
        return _mono(samples, source_rate, rate)
    except (DecodeError, ModuleNotFoundError):
        raise
    except Exception as error:  # as for pictures
        raise DecodeError(str(error) or type(error).__name__) from error


def _mono(samples: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape))) if samples.size else samples[:, 0]
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise DecodeError(f"a clip of shape {samples.shape} is empty, not finite, or has too many axes")
    if source_rate != rate:
        _check_size(samples.size, 1, source_rate, rate)
        divisor = math.gcd(source_rate, rate)
        resample_poly = needed("scipy.signal", RECORDINGS, "demo").resample_poly
        samples = resample_poly(samples, rate // divisor, source_rate // divisor)
    peak = np.abs(samples).max()
    return (samples / peak if peak > 0 else samples).astype(np.float32)


def _read_clip(source: str | Path | io.BytesIO, rate: int) -> tuple[np.ndarray, int]:
    """A file's samples, mono, and their rate."""
    soundfile = needed("soundfile", RECORDINGS, "demo")
    try:
        with soundfile.SoundFile(source) as file:
            _check_size(file.frames, file.channels, file.samplerate, rate)
            # The number of frames, because some formats (GSM 6.10, G.721) cannot seek to find their end.
            samples = file.read(file.frames, dtype="float32")  # the second axis is channels, however short the first
            return samples if samples.ndim == 1 else samples.mean(axis=1), file.samplerate
    except soundfile.LibsndfileError:
        start = _start(source)
        if start[4:8] != b"ftyp" and start[:2] not in (b"\xff\xf1", b"\xff\xf9"):
            raise
        return _read_aac(optional("av", "av", "an AAC or M4A recording"), source, rate), rate


def _read_aac(av: ModuleType, source: str | Path | io.BytesIO, rate: int) -> np.ndarray:
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
    parts, count = [], 0
    with av.open(source if isinstance(source, io.BytesIO) else str(source)) as container:
        if not container.streams.audio:
            raise DecodeError("there is no recording in it")
        for frame in chain(container.decode(audio=0), [None]):  # None: what the resampler still holds
            for piece in resampler.resample(frame):
                parts.append(piece.to_ndarray()[0])
                count += len(parts[-1])
            _check_size(count, 1, rate, rate)
    return np.concatenate(parts)


def _check_size(frames: int, channels: int, source_rate: int, rate: int) -> None:
    size = frames * channels * max(1, rate / source_rate)
    if not 0 <= size <= MOST_SAMPLES or source_rate > HIGHEST_RATE:
        raise DecodeError(f"{frames} x {channels} samples at {source_rate} Hz are too many")


def given_rate(clip: Mapping[str, Any]) -> int:
    """The rate of {"array", "sampling_rate"}."""
    rate = clip.get("sampling_rate")
    if not isinstance(rate, numbers.Real) or not 1 <= float(rate) <= HIGHEST_RATE:
        raise ValueError(f"a clip given as an array needs its sampling_rate, in samples a second, not {rate!r}")
    return int(float(rate))


def _as_float(samples: Any) -> np.ndarray:
    if type(samples).__name__ == "Tensor":  # NumPy takes none with a gradient, on a device or in bf16
        samples = samples.detach().cpu()
        samples = samples.float() if str(samples.dtype) == "torch.bfloat16" else samples
    samples = np.asarray(samples)
    if samples.dtype.kind == "u":
        return samples.astype(np.float32) - (np.iinfo(samples.dtype).max // 2 + 1)
    return samples if samples.dtype.kind == "f" else samples.astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- videos
def to_video(value: Any, frames: int = FRAMES) -> list[Image.Image]:
    """A video as `frames` square pictures, evenly spaced over it; frames of a shorter one are repeated.

    Takes a list of pictures (each as `to_image` takes it), an uint8 array or tensor [T, H, W, channels], or a file that
    PyAV reads, as a path, bytes or {"path", "bytes"}.

    Raises:
        DecodeError: a file that cannot be read, or no frame.
        TypeError: another kind of value.
        ValueError: an array of another shape.
        ModuleNotFoundError: a file without PyAV.
    """
    if type(value).__name__ == "Tensor":
        value = value.cpu().numpy()
    if not isinstance(value, np.ndarray | list | tuple):
        return _read_video(_source(value, "video"), frames)
    if isinstance(value, np.ndarray) and value.ndim != 4:
        raise ValueError(f"a video array must be [frames, H, W, channels], not {list(value.shape)}")
    given = [frame for frame in value if not is_absent(frame)]
    if not given:
        raise DecodeError("a video needs a frame, and has none")
    chosen = evenly(len(given), frames)
    pictures = {i: to_image(given[i]) for i in dict.fromkeys(chosen)}
    return [pictures[i] for i in chosen]


def evenly(count: int, frames: int) -> list[int]:
    """Which of `count` frames are taken: as in transformers, each first one of `frames` equal parts.

    >>> evenly(8, 4), evenly(2, 4)
    ([0, 2, 4, 6], [0, 0, 1, 1])
    """
    return [i * count // frames for i in range(frames)]


def _read_video(source: str | Path | io.BytesIO, frames: int) -> list[Image.Image]:
    av = needed("av", "videos are read with PyAV (the package `av`)", "media")
    try:
        # Opened here and not by its name, which libav may take for an address.
        with source if isinstance(source, io.BytesIO) else open(source, "rb") as file:
            with av.open(file) as container:
                stream = _video_stream(container)
                count = sum(packet.size > 0 for packet in container.demux(stream))  # what headers say may be wrong
            while count:
                chosen = evenly(count, frames)
                pictures, read = _decoded(av, file, set(chosen))
                if pictures.keys() == set(chosen):
                    return [pictures[i] for i in chosen]
                count = min(read, count - 1)  # some packets hold no picture
    except DecodeError:
        raise
    except Exception as error:  # as for pictures
        raise DecodeError(str(error) or type(error).__name__) from error
    raise DecodeError("no frame of it can be decoded")


def _decoded(av: ModuleType, file: BinaryIO, chosen: set[int]) -> tuple[dict[int, Image.Image], int]:
    """{number: picture} of the chosen frames, and how many frames there were up to the last of these."""
    pictures, number = {}, 0
    file.seek(0)
    with av.open(file) as container:
        stream = _video_stream(container)
        stream.thread_type = "AUTO"
        for number, frame in enumerate(container.decode(stream), start=1):
            if number - 1 in chosen:
                pictures[number - 1] = to_image(frame.to_image().rotate(frame.rotation, expand=True))
            if len(pictures) == len(chosen):
                break
    return pictures, number


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise DecodeError("there is no video in it")
    stream = container.streams.video[0]
    if stream.width * stream.height > MOST_PIXELS:
        raise DecodeError(f"{stream.width} x {stream.height} pixels are too many")
    return stream


# ------------------------------------------------------------------------------------------------------------- both
def _source(value: Any, kind: str) -> str | Path | io.BytesIO:
    """What a decoder can open: the bytes where there are any, the path otherwise."""
    source = value
    if isinstance(value, Mapping):
        source, content = value.get("path"), value.get("bytes")
        if isinstance(content, str | Path):  # which is no path there, and not opened
            raise TypeError(f'the {kind} column holds a string under "bytes": write the content itself, or a "path"')
        source = source if content is None else content
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if isinstance(source, str | Path):
        return source
    raise TypeError(
        f"the {kind} column holds {described(value)}; paths, bytes, arrays and undecoded files are understood "
        f"(in a data set: cast_column(name, {kind.title()}(decode=False)))"
    )


def _start(source: str | Path | io.BytesIO) -> bytes:
    """The first bytes, which say what a file is whatever its name is; the next reader starts at the beginning."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
        start = source.read(12)
        source.seek(0)
        return start
    with open(source, "rb") as file:
        return file.read(12)
