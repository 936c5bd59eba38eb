import numpy as np
import pytest

from u2a_fast.data.onnx_reader import read_onnx


def varint(number):
    number &= (1 << 64) - 1
    encoded = b""
    while number > 127:
        encoded += bytes([number & 127 | 128])
        number >>= 7
    return encoded + bytes([number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name, shape, data_type, *data):
    return b"".join([*(field(1, size) for size in shape), field(2, data_type), field(8, name), *data])


def model(tmp_path, *parts):
    path = tmp_path / "model.onnx"
    path.write_bytes(field(1, 8) + field(7, b"".join(parts)))
    return path


WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("data_type", "data", "expected"),
    [
        (1, field(9, WEIGHT.tobytes()), WEIGHT),
        (1, field(4, WEIGHT.tobytes()), WEIGHT),
        (10, field(9, WEIGHT.astype(np.float16).tobytes()), WEIGHT.astype(np.float16)),
        (
            7,
            field(7, b"".join(varint(n) for n in (-1, 0, 1, 2, 300, -(2**62)))),
            np.array([[-1, 0, 1], [2, 300, -(2**62)]]),
        ),
        (6, b"".join(field(5, n) for n in (1, 2, 3, 4, 5, -6)), np.array([[1, 2, 3], [4, 5, -6]], np.int32)),
    ],
    ids=["raw", "floats", "half", "packed int64", "unpacked int32"],
)
def test_reads_every_way_to_store_a_tensor(tmp_path, data_type, data, expected):
    graph = read_onnx(model(tmp_path, field(5, tensor("w", (2, 3), data_type, data))))
    assert graph.initializers["w"].dtype == expected.dtype
    np.testing.assert_array_equal(graph.initializers["w"], expected)


def test_reads_nodes_in_file_order(tmp_path):
    first = field(1, "x") + field(1, "w") + field(2, "y") + field(3, "/layer/MatMul") + field(4, "MatMul")
    second = field(1, "y") + field(2, "z") + field(4, "Relu")
    nodes = read_onnx(model(tmp_path, field(1, first), field(1, second))).nodes
    assert [(node.op_type, node.name, node.inputs, node.outputs) for node in nodes] == [
        ("MatMul", "/layer/MatMul", ("x", "w"), ("y",)),
        ("Relu", "", ("y",), ("z",)),
    ]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (tensor("w", (2, 3), 16, field(9, b"")), "data type 16"),
        (tensor("w", (2, 3), 1, field(9, b"1234")), "1 elements"),
        (tensor("w", (1,), 10, field(5, 1)), "float16"),
        (tensor("w", (1,), 1, field(14, 1)), "outside the ONNX file"),
    ],
)
def test_refuses_tensors_it_cannot_read(tmp_path, part, message):
    with pytest.raises(ValueError, match=message):
        read_onnx(model(tmp_path, field(5, part)))


def test_refuses_files_that_are_cut_short_or_no_model(tmp_path):
    path = model(tmp_path, field(5, tensor("w", (2, 3), 1, field(9, WEIGHT.tobytes()))))
    content = path.read_bytes()
    for length in range(len(content) - 1, 3, -1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut short"):
            read_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no graph"):
        read_onnx(path)
    path.write_bytes(b"\x0b\x0b\x0b")
    with pytest.raises(ValueError, match="not an ONNX model"):
        read_onnx(path)
