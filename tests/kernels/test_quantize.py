"""Row-wise int8: how far from the weight, and the same on every backend."""

import pytest
import torch
from int8_rows import assert_same_rows
from running import CPU, on, running

from u2a_fast.kernels import dequantize_rows, quantize_rows

OPS = torch.ops.u2a_fast
SHAPES = [(5, 7), (19, 700), (3, 1), (0, 4), (1, 512)]


def quantized(w, implementation, device):
    with running(implementation, device, ("bounds", "races", "order")) as launched:
        result = on(device, quantize_rows)(w)
    assert launched == (["quantize_rows_kernel"] if implementation == "triton" and w.numel() else [])
    return result


def test_eight_bits_are_wide_enough(device):
    w = torch.randn(5, 7).to(torch.float8_e4m3fn)
    for got, expected in zip(on(device, quantize_rows)(w), on(device, quantize_rows)(w.float()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_element_is_off_by_more_than_half_a_step(shape, dtype, implementation, device):
    w = (torch.randn(shape) + 0.5).to(dtype)
    q, scale = quantized(w, implementation, device)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, w.shape, w.shape[:1])
    assert ((q.double() * scale.double()[:, None] - w.double()).abs() <= scale[:, None] * (0.5 + 1e-5)).all()
    torch.testing.assert_close(scale, w.float().abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (q.abs().amax(1) == 127).all() and (q >= -127).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_every_backend_rounds_alike_and_halves_to_even(implementation, device):
    w = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5], [127.0, 3.49999, 3.5, -0.5, 0.0]])
    q, _ = quantized(w, implementation, device)
    assert q.tolist() == [[127, 0, 2, -2, -126], [127, 3, 4, 0, 0]]
    w = torch.randn(40, 300)
    assert_same_rows(quantized(w, implementation, device), quantized(w, "reference", CPU), device)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_a_row_of_zeros_stays_a_row_of_zeros(implementation, device):
    q, scale = quantized(torch.zeros(2, 5), implementation, device)
    assert not q.any() and not scale.any()
    assert not on(device, dequantize_rows)(q, scale, torch.bfloat16).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_what_is_not_finite_shows_in_the_scale_of_its_row_alone(implementation, dtype, device):
    w = torch.tensor([[1.0, -2.0], [float("nan"), 2.0], [3.0, float("-inf")]], dtype=dtype)
    _, scale = quantized(w, implementation, device)
    assert scale[0] == torch.tensor(2.0) / 127 and scale[1].isnan() and scale[2].isinf()


def test_a_transposed_weight_is_read_by_its_rows(device):
    w = torch.randn(9, 6)
    for implementation in ("torch", "triton"):
        assert_same_rows(quantized(w.t(), implementation, device), quantized(w.t().clone(), "torch", CPU), device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_dequantising_rounds_once(implementation, dtype, device):
    q, scale = quantize_rows(torch.randn(6, 50))
    wide = torch.promote_types(dtype, torch.float32)
    with running(implementation, device):
        got = on(device, dequantize_rows)(q, scale, dtype)
    assert torch.equal(got, (q.to(wide) * scale.to(wide)[:, None]).to(dtype))


@pytest.mark.slow
def test_bitsandbytes_state_divided_by_127_is_our_scale(device):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(16, 32).half()
    theirs, absmax, _ = on(device, functional.int8_vectorwise_quant)(w)
    ours, scale = on(device, quantize_rows)(w)
    torch.testing.assert_close(scale, absmax.float() / 127)
    assert (ours.int() - theirs.int()).abs().max() <= 1  # they round absmax to half precision


def test_nothing_returned_carries_a_gradient(device):
    q, scale = on(device, quantize_rows)(torch.randn(3, 4, requires_grad=True))
    assert not scale.requires_grad
    assert not on(device, dequantize_rows)(q, scale.requires_grad_(), torch.float32).requires_grad


@pytest.mark.slow
def test_opcheck_passes(device):
    opcheck = on(device, torch.library.opcheck)
    opcheck(OPS.quantize_rows, (torch.randn(5, 7),))
    opcheck(OPS.quantize_rows, (torch.randn(7, 5).t(),))
    q, scale = quantize_rows(torch.randn(5, 7))
    opcheck(OPS.dequantize_rows, (q, scale, torch.bfloat16))


@pytest.mark.slow
def test_compiles_as_one_graph(device):
    w, compiled = torch.randn(5, 7), torch.compile(quantize_rows, fullgraph=True, backend="aot_eager")
    for got, expected in zip(on(device, compiled)(w), quantize_rows(w), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("w", [torch.ones(4), torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 0)])
def test_what_is_no_floating_matrix_is_refused(w):
    with pytest.raises(ValueError, match=r"floating \[N, K\] matrix"):
        quantize_rows(w)


def test_a_scale_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"int8 \[N, K\] and scale \[N\]"):
        dequantize_rows(torch.ones(3, 4, dtype=torch.int8), torch.ones(4), torch.float32)
