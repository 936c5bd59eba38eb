"""What a table's cells may hold, and the form in which a data set keeps it."""

from __future__ import annotations

import base64
import io
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .inputs import DecodeError, described, given_rate, to_audio
from .spelling import tidy
from .splits import Row

FILES = ("image", "audio", "video")  # columns of paths, bytes or records
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
INLINE = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)  # as web pages hold a picture
LONGEST_PATH = 1000  # characters; what is longer is content
NO_GROUP = ("na", "nan", "n/a", "<na>", "none", "null", "\\n")  # a row of its own
WHOLE = re.compile(r"[+-]?\d+\.0*")  # as spreadsheets and pandas write whole numbers


def _text_cell(cell: Any, column: str, folder: Path) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if not isinstance(cell, str):
        raise ValueError(f"holds {described(cell)}, and {column} needs a string: write it as one")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds half of a surrogate pair ({cell[error.start]!r}): write the whole character"
        ) from error
    return cell


def _group_cell(cell: Any, column: str, folder: Path) -> str | None:
    """The name of a group: 1, 1.0 and " 1" are one, as of labels; None where R or pandas wrote that there is none."""
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() else str(cell)
    name = tidy(_text_cell(cell, column, folder))
    if name.casefold() in NO_GROUP:
        return None
    return name.rstrip("0").removesuffix(".") if WHOLE.fullmatch(name) else name


def _file_cell(cell: Any, column: str, folder: Path) -> Row | None:
    """{"path", "bytes"}; None for a recording that is empty."""
    if isinstance(cell, list | tuple) and len(cell) == 1 and not isinstance(cell[0], int | float):
        (cell,) = cell
    if isinstance(cell, list | tuple):
        if any(isinstance(part, int | float | list) for part in cell):
            what, cure = "a list of numbers", 'write a path, or a clip as {"array": .., "sampling_rate": ..}'
        else:
            what = f"{len(cell)} files"
            cure = "write the file of one clip" if column == "video" else "write one a row"
        raise ValueError(f"holds {what}: {cure}")
    if isinstance(cell, bytes):
        return {"path": None, "bytes": cell}
    if isinstance(cell, Mapping):
        return _record_cell(cell, column, folder)
    if not isinstance(cell, str):
        raise ValueError(f"holds {described(cell)}: write a path, bytes, or a record of path and bytes")
    cell = cell.strip()
    inline = INLINE.match(cell)
    if inline:
        try:
            return {"path": None, "bytes": base64.b64decode("".join(cell[inline.end() :].split()), validate=True)}
        except ValueError as error:
            raise ValueError(f"holds {cell[:40]!r}.., which is no base64 ({error}): write a path") from error
    if len(cell) > LONGEST_PATH:
        raise ValueError(
            f"holds {len(cell)} characters, {cell[:40]!r}.., which are no path: write one, or base64 behind "
            f"data:{column}/..;base64,"
        )
    return {"path": _place(cell, folder), "bytes": None}


def _place(cell: str, folder: Path) -> str:
    """Where the file lies that a cell names, as programs of any system write it."""
    if cell.casefold().startswith("file://"):
        cell = url2pathname(urlsplit(cell).path)
    if URL.match(cell):
        raise ValueError(f"holds the address {cell:.200}: download the file and write its path")
    name = os.path.expanduser(cell) if cell.startswith("~/") else cell
    if "\\" in name and not os.path.exists(folder / name):  # written on Windows
        name = name.replace("\\", "/")
    if not name.isascii() and not os.path.exists(folder / name):  # macOS takes accented letters apart
        forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
        name = next((form for form in forms if os.path.exists(folder / form)), name)
    place = os.path.normpath(folder / name)
    if place != place.encode(errors="replace").decode():
        raise ValueError(f"names {place!r}, which is no name in UTF-8: rename what is not")
    return place


def is_bare(cell: Any) -> bool:
    """Whether a cell is the record of a file by its path alone."""
    return isinstance(cell, Mapping) and cell.get("bytes") is None and cell.get("path") is not None


def _record_cell(cell: Mapping[str, Any], column: str, folder: Path) -> Row | None:
    if cell.get("array") is not None:
        return _clip_cell(cell) if column == "audio" else _file_cell(cell["array"], column, folder)
    path, content = cell.get("path"), cell.get("bytes")
    if content is None:
        return _file_cell(path, column, folder)
    if not isinstance(content, bytes) or not isinstance(path, str | None):
        raise ValueError(f"holds a record of {type(path).__name__} and {type(content).__name__}, not path and bytes")
    return {"path": path, "bytes": content}


def _clip_cell(clip: Mapping[str, Any]) -> Row | None:
    """The samples as a WAV file in memory: the form in which all recordings are kept."""
    import soundfile

    rate = given_rate(clip)
    try:
        samples = to_audio(clip, rate)
    except DecodeError:
        return None
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"path": None, "bytes": file.getvalue()}


READERS = {**dict.fromkeys(FILES, _file_cell), "text": _text_cell, "group": _group_cell}
