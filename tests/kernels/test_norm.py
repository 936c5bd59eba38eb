"""Norms that keep their input once: the numbers of the plain ones, and half the bytes under autocast."""

import pytest
import torch
from running import moved, on, running
from tolerance import assert_as_exact_as
from torch.nn import functional as F

from u2a_fast.kernels import chunks, layer_norm, rms_norm
from u2a_fast.memory import saved_bytes

PLAIN = {
    layer_norm: lambda x, weight, bias=None: F.layer_norm(x, x.shape[-1:], weight, bias),
    rms_norm: lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6),
}
both = pytest.mark.parametrize("norm", PLAIN)


def operands(dtype, norm=layer_norm, bias=True, rows=5, width=12):
    g = torch.Generator().manual_seed(0)
    x, weight, shift, dy = (torch.randn(n, width, generator=g, dtype=torch.float64) + 0.5 for n in (rows, 1, 1, rows))
    tensors = (x, weight[0], shift[0] if bias else None)[: 2 if norm is rms_norm else 3]
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors], dy.to(dtype)


def results(f, tensors, dy):
    given = [t for t in tensors if t is not None]
    y = f(*tensors)
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("norm, bias", [(layer_norm, True), (layer_norm, False), (rms_norm, False)])
def test_gradients_are_exact(implementation, norm, bias, device):
    tensors, _ = operands(torch.float64, norm, bias)
    given = [t for t in tensors if t is not None]
    with running(implementation, device):
        assert torch.autograd.gradcheck(lambda *leaves: on(device, norm)(*leaves, *tensors[len(leaves) :]), given)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_fp64_than_the_plain_norm(dtype, norm, device):
    tensors, dy = operands(dtype, norm, rows=300)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    plain = results(on(device, PLAIN[norm]), tensors, dy)
    expected = results(PLAIN[norm], exact, dy.double())
    got = results(on(device, norm), tensors, dy)
    for i, (ours, low, high) in enumerate(zip(got, plain, expected, strict=True)):
        assert_as_exact_as(ours, low, high, 2 if i == 0 else 3, ("y", "x", "weight", "bias")[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_rms_norm_in_pieces_give_what_they_give_at_once(dtype, monkeypatch):
    tensors, dy = operands(dtype, rms_norm, rows=301)
    expected = results(rms_norm, tensors, dy)
    monkeypatch.setattr(chunks, "CHUNK_OF_CORE", 12 * 7)
    for ours, whole in zip(results(rms_norm, tensors, dy), expected, strict=True):
        torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_an_fp32_bias_beside_bf16_rows_trains_in_fp32(implementation, device):
    (x, weight, bias), dy = operands(torch.bfloat16)
    bias = bias.detach().float().requires_grad_()
    with running(implementation, device):
        y, *_, d_bias = results(on(device, layer_norm), (x, weight, bias), dy)
    assert y.dtype == torch.bfloat16 and d_bias.dtype == torch.float32
    assert torch.allclose(d_bias, dy.float().sum(0), atol=1e-2)


@both
def test_autocast_keeps_half_and_computes_in_fp32(norm, device):
    tensors, dy = moved(operands(torch.float32, norm, rows=64), device)
    plain = results(norm, tensors, dy)
    kept = saved_bytes(lambda: norm(*tensors), tensors[1:])
    with torch.autocast(device.type, torch.bfloat16):
        narrow = results(norm, tensors, dy)
        kept_narrow = saved_bytes(lambda: norm(*tensors), tensors[1:])
    assert torch.equal(narrow[0], plain[0]) and narrow[0].dtype == torch.float32
    assert all(torch.allclose(a, b, rtol=0.02, atol=0.05) for a, b in zip(narrow, plain, strict=True))
    assert kept - kept_narrow == 64 * 12 * 2


@both
@pytest.mark.parametrize("rows, width", [(0, 12), (3, 0)])
def test_zero_rows_and_no_gradient(rows, width, norm, device):
    tensors, dy = operands(torch.float32, norm, rows=rows, width=width)
    y, *gradients = results(on(device, norm), tensors, dy)
    assert y.shape == (rows, width) and [t.shape for t in gradients] == [t.shape for t in tensors]
    with torch.no_grad():
        assert not on(device, norm)(*tensors).requires_grad


@pytest.mark.parametrize("x, vectors, error, message", [
    (torch.ones(3, 4), [torch.ones(5)], ValueError, r"weight must be \[4\] like the rows of x, not \[5\]"),
    (torch.ones(3, 4), [torch.ones(1)], ValueError, r"weight must be \[4\]"),
    (torch.ones(3, 4), [torch.ones(3, 4)], ValueError, r"weight must be \[4\]"),
    (torch.tensor(1.0), [torch.tensor(1.0)], ValueError, r"weight must be \[\]"),
    (torch.ones(3, 4).int(), [torch.ones(4)], TypeError, "x must be floating, not torch.int32"),
    (torch.ones(3, 4), [torch.ones(4), torch.ones(3)], ValueError, r"bias must be \[4\]"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(x, vectors, error, message):
    for norm in PLAIN if len(vectors) == 1 else (layer_norm,):
        with pytest.raises(error, match=message):
            norm(x, *vectors, *([None] if norm is layer_norm and len(vectors) == 1 else []))
