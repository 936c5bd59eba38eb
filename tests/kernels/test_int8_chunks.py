"""What a CPU does chunk by chunk, to stay in its cache, is what the plain function says, whatever the chunk."""

import importlib

import pytest
import torch
from tolerance import assert_as_exact_as

from u2a_fast.kernels import chunks, lora_linear, set_backend

module = importlib.import_module("u2a_fast.kernels.quantize")
SHAPES = [(700, 1000), (3, 5), (0, 8), (257, 1024)]  # the first and the last take several chunks


def matrix(shape, dtype, transposed):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(*(reversed(shape) if transposed else shape), generator=g, dtype=torch.float64) + 0.2
    w = w.t() if transposed else w
    if shape[0] > 2:
        w[2] = 0
    return w.to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_quantised_and_restored_bit_for_bit(shape, dtype, transposed):
    w = matrix(shape, dtype, transposed)
    q, scale = module.quantize_rows_aten(w)
    expected, expected_scale = module.quantize_rows_reference(w)
    assert torch.equal(q, expected) and torch.equal(scale, expected_scale) and q.is_contiguous()
    restored = module.dequantize_rows_aten(q, scale, dtype)
    assert torch.equal(restored, module.dequantize_rows_reference(q, scale, dtype)) and restored.dtype == dtype


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_over_several_chunks(dtype, bias, monkeypatch):
    x, w = matrix((90, 64), dtype, False), matrix((200, 64), torch.float32, False)
    q, scale = module.quantize_rows_reference(w)
    shift = torch.randn(200).to(dtype) if bias else None
    operands = (q, shift, None, None, 1.0)
    results = {}
    for chunk, parts in ((1 << 18, 1), (700, 30)):  # one chunk, and three rows at a time
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        assert len(chunks.row_chunks(torch.empty(90, 200))) == parts
        results[chunk] = lora_linear(x, *operands, weight_scale=scale, quantize_input=True)
    assert torch.equal(results[1 << 18], results[700])
    set_backend("reference")
    plain = lora_linear(x, *operands, weight_scale=scale, quantize_input=True)
    wide = None if shift is None else shift.double()
    exact = lora_linear(x.double(), q, wide, None, None, 1.0, weight_scale=scale, quantize_input=True)
    assert_as_exact_as(results[700], plain, exact, 2)
