"""What a processor makes of a picture, recording or video, kept on disk, so that it is not decoded and processed again.

The key is the sha256 of the cell's content, of the processor (class and configuration) and of the versions of what
decodes and processes: a file that is copied, moved or renamed is found, one that is changed is not. Processes may share
a folder: they write the same tensors.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..tensor_files import TensorFiles, digest

FORMAT = "1"  # part of every key: raise it when what is stored, or how a cell is read, changes
LIBRARIES = ("transformers", "torch", "torchvision", "numpy", "pillow", "pillow-heif", "scipy", "soundfile", "av")


class ProcessedCache:
    """The tensors of single cells under `folder`, by content and processor.

    Raises:
        ValueError: `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike):
        self._files = TensorFiles(folder)

    def lookup(
        self,
        processor: Any,
        cells: Sequence[Any],
        read: Callable[[Any], Any],
        process: Callable[[Any], dict[str, Tensor]],
    ) -> list[dict[str, Tensor] | None]:
        """`process(read(cell))` of every cell, called for those only that are not there; None where there is nothing.

        Args:
            processor: the image processor or feature extractor that `process` calls.
            cells: as `read_cell` takes them.
            read: gives what is in the cell, a picture or an array, or None where it is absent or cannot be decoded;
                that is never kept.
        """
        # Two classes may write the same configuration: the backends of one image processor do.
        prefix = f"{FORMAT} {type(processor)} {processor.to_json_string()} {_versions()}"
        return [self._row(prefix, cell, read, process) for cell in cells]

    def _row(
        self, prefix: str, cell: Any, read: Callable[[Any], Any], process: Callable[[Any], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        value, content = None, file_digest(cell)
        if content is None:  # no file: it is decoded already, or there is nothing
            value = read(cell)
            if value is None:
                return None
            arrays = value if isinstance(value, list) else [value]  # the frames of a video
            content = " ".join(_array_digest(np.asarray(array)) for array in arrays)
        key = digest(f"{prefix} {content}")
        stored = self._files.read(key)
        if stored is None:
            value = read(cell) if value is None else value
            if value is None:
                return None
            stored = process(value)
            self._files.write(key, stored)
        return stored


def file_digest(cell: Any) -> str | None:
    """sha256 of the bytes that a cell holds or names; None where it holds something else, or no file can be read.

    >>> file_digest(b"abc") == file_digest({"path": None, "bytes": b"abc"}), file_digest("nowhere.png")
    (True, None)
    """
    if isinstance(cell, Mapping):
        if cell.get("array") is not None:  # decoded by `datasets`, which leaves the path beside it
            return None
        cell, content = cell.get("path"), cell.get("bytes")
        if content is not None:
            cell = content if isinstance(content, bytes | bytearray) else None  # a string is no path there
    if isinstance(cell, bytes | bytearray):
        return hashlib.sha256(cell).hexdigest()
    if isinstance(cell, str | Path):
        try:
            with open(cell, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):  # a name with a null byte
            return None
    return None


def _array_digest(array: np.ndarray) -> str:
    content = hashlib.sha256(f"array {array.dtype} {array.shape}".encode())
    content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


@functools.cache
def _versions() -> str:
    return " ".join(f"{name} {_version(name)}" for name in LIBRARIES)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
