"""The weights of a CTranslate2 `model.bin` (binary version 6), read with NumPy alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def read_ctranslate2(path: str | Path) -> dict[str, np.ndarray]:
    """All variables of a `model.bin`: name -> array, read-only.

    Raises:
        ValueError: another binary version, an unknown type, or a file that is cut short.
    """
    variables = {}
    with open(path, "rb") as file:
        (version,) = _unpack(file, "<I")
        if version != 6:
            raise ValueError(f"{path} has CTranslate2 binary version {version}; only version 6 can be read")
        _string(file)  # name of the model specification
        _, count = _unpack(file, "<II")  # its revision, number of variables
        for _ in range(count):
            name = _string(file)
            (rank,) = _unpack(file, "<B")
            shape = _unpack(file, f"<{rank}I")
            dtype, size = _unpack(file, "<BI")
            if dtype >= len(DTYPES):
                raise ValueError(f"{path} holds {name!r} with the unknown CTranslate2 type {dtype}")
            variables[name] = np.frombuffer(_read(file, size), DTYPES[dtype]).reshape(shape)
    return variables


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{file.name} is cut short: fetch it again")
    return data


def _unpack(file: BinaryIO, layout: str) -> tuple:
    return struct.unpack(layout, _read(file, struct.calcsize(layout)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<H")
    return _read(file, length).rstrip(b"\0").decode()
