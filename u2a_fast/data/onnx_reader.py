"""The weights and the node list of an ONNX file, read with NumPy alone.

ONNX files are Protocol Buffers messages. To lift weights out of one, three message types and a few fields are enough,
so this small reader replaces the `onnx` package and its protobuf dependency:

    ModelProto   7 graph
    GraphProto   1 node, 5 initializer
    NodeProto    1 input, 2 output, 3 name, 4 op_type
    TensorProto  1 dims, 2 data_type, 4 float_data, 5 int32_data, 7 int64_data, 8 name, 9 raw_data, 14 data_location
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# TensorProto.DataType -> NumPy. bfloat16 (16), strings and complex numbers have no entry on purpose.
DTYPES = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Field = tuple[int, Any]  # an int, or a memoryview of bytes


@dataclass(frozen=True)
class OnnxNode:
    """One operation of the graph."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """The constants of a graph by name, and its operations in file order.

    The arrays are read-only views into the file's bytes: copy before changing one.
    """

    initializers: dict[str, np.ndarray]
    nodes: list[OnnxNode]


def read_onnx(path: str | Path) -> OnnxGraph:
    """The constants and operations of an ONNX file.

    Raises:
        ValueError: it is not an ONNX model, or keeps its weights in other files.
    """
    message = memoryview(Path(path).read_bytes())
    graph = next((value for number, value in _fields(message) if number == 7), None)
    if not isinstance(graph, memoryview):
        raise ValueError(f"{path} is not an ONNX model: it holds no graph")

    initializers = {}
    nodes = []
    for number, value in _fields(graph):
        if number == 5:
            name, array = _tensor(value)
            initializers[name] = array
        elif number == 1:
            nodes.append(_node(value))
    return OnnxGraph(initializers, nodes)


def _node(message: memoryview) -> OnnxNode:
    strings: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    for number, value in _fields(message):
        if number in strings:
            strings[number].append(_text(value))
    return OnnxNode("".join(strings[4]), "".join(strings[3]), tuple(strings[1]), tuple(strings[2]))


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    name = ""
    shape = []
    data_type = 0
    raw = memoryview(b"")
    typed = []
    for number, value in _fields(message):
        if number == 1:
            shape.extend(_integers(value))
        elif number == 2:
            data_type = value
        elif number == 4:
            typed.append(np.frombuffer(value, np.float32))
        elif number in (5, 7):
            # Two's complement in 64 bits, whatever the element type.
            typed.append(np.array(_integers(value), np.uint64).astype(np.int64))
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = value
        elif number == 14 and value == 1:
            raise ValueError(f"the tensor {name!r} is stored outside the ONNX file; save the model as one file")

    dtype = DTYPES.get(data_type)
    if dtype is None:
        raise ValueError(f"the tensor {name!r} has ONNX data type {data_type}; readable are {sorted(DTYPES)}")
    if typed and dtype == np.float16:
        raise ValueError(f"the tensor {name!r} packs float16 into int32_data; save it as raw data instead")
    flat = np.concatenate(typed).astype(dtype) if typed else np.frombuffer(raw, dtype)
    if flat.size != int(np.prod(shape)):
        raise ValueError(f"the tensor {name!r} has {flat.size} elements, which do not fill its shape {shape}")
    return name, flat.reshape(shape)


def _fields(message: memoryview) -> Iterator[Field]:
    """(field number, value) of a message: an integer for varints, bytes for everything else."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number = key >> 3
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == BYTES:
            length, position = _varint(message, position)
        elif wire_type in (FIXED64, FIXED32):
            length = 8 if wire_type == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position} does not exist: this is not an ONNX model")
        if position + length > len(message):
            raise ValueError("the ONNX file is cut short: it ends in the middle of a field")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    shift = 0
    while True:
        if position >= len(message):
            raise ValueError("the ONNX file is cut short: it ends in the middle of a number")
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def _integers(value: int | memoryview) -> list[int]:
    """A repeated integer field comes either one by one or packed into bytes."""
    if isinstance(value, int):
        return [value]
    numbers = []
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        numbers.append(number)
    return numbers


def _text(value: memoryview) -> str:
    return bytes(value).decode()
