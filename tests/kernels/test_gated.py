"""The activation of a gated MLP: every backend and activation against the formula in fp64."""

import importlib

import pytest
import torch
from formulas import ACTIVATIONS
from running import on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import gated, set_backend
from u2a_fast.memory import saved_bytes

module = importlib.import_module("u2a_fast.kernels.gated")  # the package's attribute of that name is the function
IMPLEMENTATIONS = ("reference", "torch", "triton")
SANITIZERS = ("bounds", "races", "order")
SHAPES = [(5, 7), (3, 11, 70), (1, 513), (0, 8), (2, 0, 3), (4, 1), (3, 0), (2, 3, 0), (150, 1100)]  # and F of them


def operands(shape, dtype):
    """Values on both sides of where an activation bends."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(*shape[:-1], 2 * shape[-1], generator=g, dtype=torch.float64) * 1.5 + 0.3
    return h.to(dtype), (torch.randn(shape, generator=g, dtype=torch.float64) + 0.2).to(dtype)


def results(f, h, dy):
    h = h.detach().requires_grad_()
    y = f(h)
    return y.detach(), *torch.autograd.grad(y, h, dy)


def computed(implementation, device, activation, h, dy):
    with running(implementation, device, SANITIZERS) as launched:
        got = results(on(device, lambda h: gated(h, activation)), h, dy)
    kernels = ["gated_forward_kernel", "gated_backward_kernel"]
    assert launched == (kernels if implementation == "triton" and h.numel() else [])
    return got


def written_out(activation):
    def run(h):
        gate, up = h.chunk(2, -1)
        return ACTIVATIONS[activation](gate) * up

    return run


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula(shape, activation, implementation, device):
    given = operands(shape, torch.float64)
    expected = results(written_out(activation), *given)
    for got, exact in zip(computed(implementation, device, activation, *given), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_plain_low_precision(dtype, activation, implementation, device):
    h, dy = operands((70, 130), dtype)
    plain = results(on(device, written_out(activation)), h, dy)
    exact = results(written_out(activation), h.double(), dy.double())
    got = computed(implementation, device, activation, h, dy)
    # To divide by 1.702 a GPU multiplies with the inverse, which rounds once more.
    factor = 3 if (implementation, activation, device.type) == ("torch", "quick_gelu", "cuda") else 2
    for i, (t, rough, true) in enumerate(zip(got, plain, exact, strict=True)):
        assert t.dtype == dtype
        assert_as_exact_as(t, rough, true, factor + i, ("y", "h")[i])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_what_is_not_finite_stays_in_its_element(implementation, device):
    h = torch.tensor([[1.0, float("nan"), 2.0, 1.0, 1.0, float("inf")]])
    for activation in ACTIVATIONS:
        with running(implementation, device):
            y = on(device, gated)(h, activation)
        assert y.isfinite().tolist() == [[True, False, False]]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("strided", [lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]])
def test_non_contiguous_input_gives_the_same(strided, implementation, device):
    h, dy = operands((9, 5), torch.float64)
    assert not strided(h).is_contiguous()
    for given in ((strided(h), dy), (h, strided(dy)), (h, dy[:1, :1].expand_as(dy))):
        expected = results(written_out("silu"), *given)
        for got, exact in zip(computed(implementation, device, "silu", *given), expected, strict=True):
            torch.testing.assert_close(got, exact)


def test_backward_keeps_its_input_alone(device):
    h = torch.randn(30, 16, device=device, requires_grad=True)
    assert saved_bytes(lambda: gated(h, "silu")) == 30 * 16 * 4
    with torch.no_grad():
        assert gated(h, "silu").grad_fn is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, device):
    set_backend("torch")
    h = operands((3, 4), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda h: on(device, gated)(h, activation), h)


@pytest.mark.slow
def test_opcheck(device):
    set_backend("torch")
    h, dy = operands((2, 5, 7), torch.float32)
    opcheck = on(device, torch.library.opcheck)
    for given in (h, h.transpose(0, 1).contiguous().transpose(0, 1), h[:, :, 3:9]):
        opcheck(module.gated_forward.registered, (given, "silu"))
        opcheck(module.gated_backward.registered, (dy[..., : given.shape[2] // 2], given, "gelu"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend, device):
    set_backend("torch")
    given = operands((6, 5), torch.float32)
    compiled = torch.compile(lambda h: gated(h, "silu"), fullgraph=True, backend=backend)
    for got, expected in zip(results(on(device, compiled), *given), results(written_out("silu"), *given), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("h, activation, message", [
    (torch.ones(2, 4), "swish", "unknown activation 'swish': choose one of gelu"),
    (torch.ones(2, 5), "silu", "gate and up side by side"),
    (torch.tensor(1.0), "silu", "gate and up side by side"),
    (torch.ones(2, 4).int(), "silu", "must be floating"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(h, activation, message):
    with pytest.raises(ValueError, match=message):
        gated(h, activation)
