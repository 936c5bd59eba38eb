"""One cell of a table as what a processor takes: a square RGB picture, or a mono clip at a given rate."""

from __future__ import annotations

import importlib
import io
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


LONGEST_SIDE = 4096  # of a picture; the square around a thin one would take gigabytes

# What the header of a damaged recording claims beyond these is not believed, and nothing is allocated for it.
MOST_SAMPLES = 2**29  # 2 GiB of float32, 9 hours at 16 kHz
HIGHEST_RATE = 768_000


class DecodeError(ValueError):
    """A file, or its content, cannot be decoded."""


def is_absent(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN, a blank string, or a file record with neither path nor content.

    >>> [is_absent(value) for value in (None, float("nan"), " ", {"path": None, "bytes": None}, "a.png", 0)]
    [True, True, True, True, False, False]
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(value.get(key) is None for key in ("array", "bytes", "path"))
    if isinstance(value, float | np.floating):
        return bool(np.isnan(value))
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # pandas' own, without importing it


def to_image(value: Any) -> Image.Image:
    """A picture as a square RGB image: transparent pixels and the padding are white.

    Takes a path, bytes, {"path", "bytes"}, a PIL image of any mode but F, or an uint8 array [H, W] or [H, W, 1 to 4].
    Square, because the centre crop of most processors would cut the ends off anything else.

    Raises:
        DecodeError: a file that cannot be read.
        TypeError: another kind of value.
        ValueError: an array of another shape.
    """
    from PIL import Image, ImageOps

    if isinstance(value, np.ndarray):
        value = _from_array(value)
    try:
        image = value if isinstance(value, Image.Image) else Image.open(_source(value, "image"))
        return _white_square(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise DecodeError(str(error)) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    if pixels.dtype != np.uint8:
        raise TypeError(f"an image array must be uint8 (0 to 255), not {pixels.dtype}")
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"an image array must be [H, W] or [H, W, channels], not {list(pixels.shape)}; transpose it")
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def _white_square(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise DecodeError("mode F does not say which number is white; convert it to 8 bits (0 to 255)")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Sixteen bits: Pillow's own conversion would clip all but the darkest pixels to white. "I" may hold eight too.
        shades = np.asarray(image)
        scale = 1 if image.mode == "I" and shades.max() <= 255 else 257
        image = Image.fromarray((shades // scale).clip(0, 255).astype(np.uint8))
    transparent = "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA" if transparent else "RGB")
    if max(image.size) > LONGEST_SIDE:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    side = max(image.size)
    if not transparent and image.width == image.height:
        return image
    square = Image.new("RGB", (side, side), "white")
    corner = ((side - image.width) // 2, (side - image.height) // 2)
    square.paste(image, corner, mask=image if transparent else None)
    return square


def to_audio(value: Any, rate: int) -> np.ndarray:
    """A clip as float32 [samples] at `rate` samples a second: mono, resampled, scaled to a peak of 1.

    Takes a path, bytes, {"path", "bytes"}, {"array", "sampling_rate"}, or an array, which is taken to be at `rate`
    already. An array with two axes is averaged over the shorter one.

    Raises:
        DecodeError: it cannot be read, is empty, or is not finite.
        TypeError: another kind of value.
        ValueError: an array without its rate.
    """
    samples, source_rate = _samples(value, rate)
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise DecodeError(f"a clip of shape {samples.shape} is empty, not finite, or has too many axes")
    if source_rate != rate:
        resample_poly = _import_for_audio("scipy.signal").resample_poly
        divisor = math.gcd(source_rate, rate)
        samples = resample_poly(samples, rate // divisor, source_rate // divisor)
    peak = np.abs(samples).max()
    return (samples / peak if peak > 0 else samples).astype(np.float32)


def _samples(value: Any, rate: int) -> tuple[np.ndarray, int]:
    """The clip as it was stored, [samples] or [samples, channels], and its rate."""
    if isinstance(value, Mapping) and value.get("array") is not None:
        rate = _given_rate(value)
        value = value["array"]
    if isinstance(value, np.ndarray | list | tuple) or type(value).__name__ == "Tensor":
        return _as_float(np.asarray(value)), rate
    soundfile = _import_for_audio("soundfile")
    try:
        with soundfile.SoundFile(_source(value, "audio")) as file:
            size = file.frames * file.channels * max(1, rate / file.samplerate)
            if not 0 <= size <= MOST_SAMPLES or file.samplerate > HIGHEST_RATE:
                raise DecodeError(f"{file.frames} x {file.channels} samples at {file.samplerate} Hz are too many")
            return file.read(dtype="float32"), file.samplerate
    except (OSError, RuntimeError) as error:
        raise DecodeError(str(error)) from error


def _given_rate(clip: Mapping[str, Any]) -> int:
    rate = clip.get("sampling_rate")
    if not isinstance(rate, numbers.Real) or not 1 <= rate < math.inf:
        raise ValueError(f"a clip given as an array needs its sampling_rate, in samples a second, not {rate!r}")
    return int(rate)


def _import_for_audio(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = "recordings are read with soundfile and SciPy; get them with `pip install 'u2a-fast[demo]'`"
        raise ModuleNotFoundError(message, name=error.name) from error


def _as_float(samples: np.ndarray) -> np.ndarray:
    return samples if samples.dtype.kind == "f" else samples.astype(np.float32)


def _source(value: Any, kind: str) -> str | Path | io.BytesIO:
    """What a decoder can open: the bytes where there are any, the path otherwise."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes | bytearray):
        return io.BytesIO(value)
    if isinstance(value, str | Path):
        return value
    raise TypeError(
        f"the {kind} column holds a {type(value).__name__}; paths, bytes, arrays and undecoded files are understood "
        f"(in a data set: cast_column(name, {kind.title()}(decode=False)))"
    )
