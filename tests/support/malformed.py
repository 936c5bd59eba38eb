"""Malformed bytes, cells and tables, each drawn from a `random.Random`."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image
from pyarrow import parquet

FORMS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA", "PCX", "JPEG2000")
SOUNDS = (
    *(("WAV", "PCM_16"), ("WAV", "GSM610"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")),
    *(("AIFF", "PCM_24"), ("AU", "G721_32"), ("CAF", "ALAW")),
)
ODD = (
    *("", " ", "\0", "\ud800", "\u2028", "\ufeff", '"', "'", ";", "|", ",", "\t", "\n", "nan", "inf", "-0", "1e999"),
    *("None", "[]", "{}", "a.png", "../a.png", "/dev/null", "https://a.b/c.png", "[bold]x[/b]", "é", "e\u0301", "true"),
    *("1", "1.0", "x" * 300),
)
HEADERS = (
    "image",
    "text",
    "audio",
    "label",
    "split",
    "group",
    "Text",
    " text ",
    "title",
    "caption",
    "labels",
    "path",
    "",
    "text",
)
PLAIN = {
    "image": ("a.png", "a.png", ""),
    "audio": ("a.wav", ""),
    "text": ("a dog", "red square", ""),
    "label": ("x", "y", 1, 0, 0.5, ["x", "y"]),
    "split": ("train", "test", "val"),
}


def damage(draw: random.Random, content: bytes) -> bytes:
    """Bits flipped, numbers set to their extremes, parts cut, doubled or put in."""
    content = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 4, 16))):
        place = draw.randrange(len(content) + 1)
        way = draw.randrange(5)
        if way == 0 and content:
            content[place % len(content)] ^= 1 << draw.randrange(8)
        elif way == 1:
            content[place : place + 4] = draw.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80")
            )
        elif way == 2:
            content = content[:place]
        elif way == 3:
            content[place:place] = content[place : place + 40]
        else:
            content[place:place] = draw.randbytes(draw.randrange(12))
    return bytes(content)


def picture(draw: random.Random) -> bytes:
    mode = draw.choice(("RGB", "L", "P", "RGBA", "1", "CMYK"))
    width, height = draw.randint(1, 40), draw.randint(1, 40)
    image, file = (
        Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height)).convert(mode),
        io.BytesIO(),
    )
    form = draw.choice(FORMS)
    try:
        image.save(file, form)
    except (OSError, ValueError, KeyError):  # a mode that this format does not have
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
    return damage(draw, file.getvalue())


def clip(draw: random.Random) -> bytes:
    form, subtype = draw.choice(SOUNDS)
    samples, file = np.sin(np.arange(draw.randint(1, 4000)) / 9), io.BytesIO()
    soundfile.write(file, samples, draw.choice((8000, 16_000, 44_100)), format=form, subtype=subtype)
    return damage(draw, file.getvalue())


def cell(draw: random.Random, depth: int = 2):
    ways = ("odd", "odd", "word", "number", "none", "bool", "bytes", "list", "record")
    way = draw.choice(ways if depth else ways[:-2])
    if way == "odd":
        return draw.choice(ODD)
    if way == "word":
        return "".join(draw.choice("abcé犬 ;,|\"'\n") for _ in range(draw.randrange(8)))
    if way == "number":
        return draw.choice((0, 1, -1, 10**30, 0.5, 1e308, float("nan"), float("inf"), draw.random()))
    if way == "list":
        return [cell(draw, depth - 1) for _ in range(draw.randrange(4))]
    if way == "record":
        names = draw.sample(("path", "bytes", "array", "sampling_rate", "x"), draw.randrange(4))
        return {name: cell(draw, depth - 1) for name in names}
    return {"none": None, "bool": draw.random() < 0.5, "bytes": draw.randbytes(5)}[way]


def header(draw: random.Random) -> list[str]:
    names = HEADERS[:5] if draw.random() < 0.6 else HEADERS
    return draw.sample(names, draw.randint(1, 4))


def filled(draw: random.Random, name: str):
    """What a column should hold, for the most part."""
    plain = PLAIN.get(name.strip().lower(), ("a",))
    return draw.choice(plain) if draw.random() < 0.96 else cell(draw)


def row(draw: random.Random) -> dict:
    return {name: filled(draw, name) for name in header(draw)}


def without_bytes(value):
    if isinstance(value, dict):
        return {name: without_bytes(part) for name, part in value.items()}
    return (
        [without_bytes(part) for part in value]
        if isinstance(value, list)
        else None
        if isinstance(value, bytes)
        else value
    )


def json_lines(draw: random.Random) -> bytes:
    lines = [json.dumps(without_bytes(row(draw)), ensure_ascii=draw.random() < 0.5) for _ in range(draw.randrange(6))]
    if draw.random() < 0.3:
        lines.insert(
            draw.randrange(len(lines) + 1), draw.choice(("null", "[1]", "{", "3", '"a"', "[" * 5000, '{"a":' * 3000))
        )
    content = draw.choice(("\n", "\r\n", "\n\n")).join(lines).encode("utf-8", "surrogatepass")
    return damage(draw, content) if draw.random() < 0.2 else content


def comma_table(draw: random.Random) -> bytes:
    separator = draw.choice((",", ";", "\t", "|"))
    names = header(draw)
    rows = [
        [str(cell(draw, 0)) for _ in range(len(names) + draw.choice((0, 0, 0, 1, -1)))]
        for _ in range(draw.randrange(6))
    ]
    text = "\n".join(separator.join(cells) for cells in [names, *rows])
    encoding = draw.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16", "cp1252"))
    content = text.encode(encoding, "surrogatepass" if encoding[:3] == "utf" else "replace")
    return damage(draw, content) if draw.random() < 0.2 else content


def parquet_table(draw: random.Random) -> bytes:
    names = draw.sample(HEADERS[:6], draw.randint(1, 3))
    kinds = {
        name: draw.choice((pa.string(), pa.binary(), pa.int64(), pa.float64(), pa.list_(pa.string()))) for name in names
    }
    values = {pa.string(): "a", pa.binary(): b"a", pa.int64(): 1, pa.float64(): 0.5, pa.list_(pa.string()): ["a"]}
    columns = {n: pa.array([draw.choice((values[k], None)) for _ in range(4)], k) for n, k in kinds.items()}
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return damage(draw, file.getvalue()) if draw.random() < 0.3 else file.getvalue()
