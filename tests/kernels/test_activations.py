import formulas
import pytest
import torch

from u2a_fast.kernels.activations import ACTIVATIONS, SMALL, gelu


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (2, 3), (6,)])
def test_gelu_is_bitwise_that_of_the_rows_in_any_shape(shape):
    u = torch.randn(6, 40)
    assert torch.equal(gelu(u.view(*shape, 40)).view(6, 40), ACTIVATIONS["gelu"][0](u))


@pytest.mark.parametrize("rows", [1, SMALL // 64, SMALL // 64 + 1])  # on either side of what a CPU calls small
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_slopes_are_autograds(name, rows):
    act, backward = ACTIVATIONS[name]
    u, d = torch.randn(rows, 64), torch.randn(rows, 64)
    exact = u.double().requires_grad_()
    expected = formulas.ACTIVATIONS[name](exact)
    (slope,) = torch.autograd.grad(expected, exact, d.double())
    for ours, theirs in ((act(u), expected.detach()), (backward(d, u), slope)):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)
