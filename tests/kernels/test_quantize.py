"""Row-wise int8: how far from the weight, and the same on every backend."""

import pytest
import torch
from triton_interpreter import interpreted

from u2a_fast.kernels import dequantize_rows, quantize_rows, set_backend

OPS = torch.ops.u2a_fast
SHAPES = [(5, 7), (19, 700), (3, 1), (0, 4), (1, 512)]


def quantized(w, implementation):
    if implementation == "triton":
        with interpreted(("bounds", "races", "order")) as launched:
            result = quantize_rows(w)
        assert launched == (["quantize_rows_kernel"] if w.numel() else [])
        return result
    set_backend(implementation)
    return quantize_rows(w)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_element_is_off_by_more_than_half_a_step(shape, dtype, implementation):
    w = (torch.randn(shape) + 0.5).to(dtype)
    q, scale = quantized(w, implementation)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, w.shape, w.shape[:1])
    assert ((q.double() * scale.double()[:, None] - w.double()).abs() <= scale[:, None] * (0.5 + 1e-5)).all()
    torch.testing.assert_close(scale, w.float().abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert (q.abs().amax(1) == 127).all() and (q >= -127).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_every_backend_rounds_alike_and_halves_to_even(implementation):
    w = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5], [127.0, 3.49999, 3.5, -0.5, 0.0]])
    q, _ = quantized(w, implementation)
    assert q.tolist() == [[127, 0, 2, -2, -126], [127, 3, 4, 0, 0]]
    w = torch.randn(40, 300)
    for got, expected in zip(quantized(w, implementation), quantized(w, "reference"), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_a_row_of_zeros_stays_a_row_of_zeros(implementation):
    q, scale = quantized(torch.zeros(2, 5), implementation)
    assert not q.any() and not scale.any()
    assert torch.equal(dequantize_rows(q, scale, torch.bfloat16), torch.zeros(2, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_what_is_not_finite_shows_in_the_scale_of_its_row_alone(implementation, dtype):
    w = torch.tensor([[1.0, -2.0], [float("nan"), 2.0], [3.0, float("-inf")]], dtype=dtype)
    _, scale = quantized(w, implementation)
    assert scale[0] == torch.tensor(2.0) / 127 and scale[1].isnan() and scale[2].isinf()


def test_a_transposed_weight_is_read_by_its_rows():
    w = torch.randn(9, 6)
    for implementation in ("torch", "triton"):
        for got, expected in zip(quantized(w.t(), implementation), quantized(w.t().clone(), "torch"), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_dequantising_rounds_once(implementation, dtype):
    q, scale = quantize_rows(torch.randn(6, 50))
    set_backend(implementation)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(dequantize_rows(q, scale, dtype), (q.to(wide) * scale.to(wide)[:, None]).to(dtype))


@pytest.mark.slow
def test_bitsandbytes_state_divided_by_127_is_our_scale():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(16, 32).half()
    theirs, absmax, _ = functional.int8_vectorwise_quant(w)
    ours, scale = quantize_rows(w)
    torch.testing.assert_close(scale, absmax.float() / 127)
    assert (ours.int() - theirs.int()).abs().max() <= 1  # they round absmax to half precision


def test_nothing_returned_carries_a_gradient():
    q, scale = quantize_rows(torch.randn(3, 4, requires_grad=True))
    assert not scale.requires_grad
    assert not dequantize_rows(q, scale.requires_grad_(), torch.float32).requires_grad


def test_opcheck_passes():
    torch.library.opcheck(OPS.quantize_rows, (torch.randn(5, 7),))
    torch.library.opcheck(OPS.quantize_rows, (torch.randn(7, 5).t(),))
    q, scale = quantize_rows(torch.randn(5, 7))
    torch.library.opcheck(OPS.dequantize_rows, (q, scale, torch.bfloat16))


def test_compiles_as_one_graph():
    w = torch.randn(5, 7)
    for got, expected in zip(
        torch.compile(quantize_rows, fullgraph=True, backend="aot_eager")(w), quantize_rows(w), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("w", [torch.ones(4), torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 0)])
def test_what_is_no_floating_matrix_is_refused(w):
    with pytest.raises(ValueError, match=r"floating \[N, K\] matrix"):
        quantize_rows(w)


def test_a_scale_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"int8 \[N, K\] and scale \[N\]"):
        dequantize_rows(torch.ones(3, 4, dtype=torch.int8), torch.ones(4), torch.float32)
