"""A weight with room beside it gives what one without it does: values, every gradient, and no copy of the weight."""

import copy

import pytest
import torch
from running import on, running, skip_wide_tiles
from tolerance import assert_as_exact_as

from u2a_fast import LoraConfig
from u2a_fast.kernels import Linear, Norm, linear_lowrank, steps_aten, steps_triton
from u2a_fast.kernels.norm_joined import joined_weight, write_factor
from u2a_fast.lora import LoraLinear

# width, outputs, groups, lead, rank, norm ("rms": RMSNorm), bias
CASES = {
    "q, k, v": (48, 96, 3, 1, 5, True, True),
    "q twice as wide": (48, 96, 3, 2, 5, True, True),
    "no norm": (32, 24, 1, 1, 5, False, True),
    "rank of a tile": (32, 48, 2, 1, 8, True, False),
    "ranks of several tiles": (16, 25, 3, 3, 30, True, True),
    "RMSNorm": (48, 96, 3, 1, 5, "rms", True),
}
ROWS = 21


def operands(case, dtype, seed=0):
    width, outputs, groups, lead, rank, norm, bias = CASES[case]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0, std=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std + mean

    weight = draw(outputs, width, std=width**-0.5).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    low = draw(groups * rank, width, std=0.2).to(wide), draw(outputs, rank).to(wide)
    joined = joined_weight(weight, groups * rank)
    linear = Linear(
        joined[:, :width], draw(outputs).to(dtype) if bias else None, *low, None, 0.7, groups, lead, False, joined
    )
    gamma, beta = draw(width, mean=1.0).to(wide), draw(width).to(wide) if norm is True else None
    given = Norm(gamma, beta, 1e-5, norm == "rms") if norm else Norm()
    return draw(ROWS, width, mean=0.5).to(dtype), given, linear


def results(steps, x, norm, linear, dtype):
    """y and the gradients of x, of the norm's weight and bias, of A and B; the residual's gradient joins that of x."""
    y, s, mean, rstd = steps.enter_project(x, norm, linear, dtype)
    g = torch.Generator().manual_seed(1)
    dy, dx = (torch.randn(t.shape, generator=g, dtype=torch.float64).to(x) for t in (y, x))
    needs = (True, norm.weight is not None, norm.bias is not None, True, True)
    grads = steps.enter_project_backward(dy, dx.clone(), (x, mean, rstd, s), norm, linear, needs)
    return [t for t in (y, *grads) if t is not None]


def exactly(tree):
    return tree if tree is None or not torch.is_tensor(tree) else tree.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_a_weight_by_itself(case, dtype, device):
    if dtype == torch.float64:
        skip_wide_tiles("triton", device)
    x, norm, linear = operands(case, dtype)
    plain = linear._replace(joined=None)
    exact = results(steps_aten, x.double(), Norm(*map(exactly, norm)), Linear(*map(exactly, plain)), torch.float64)
    low = results(steps_aten, x, norm, plain, dtype)
    with running("triton", device, ("bounds", "races", "order")) as launched:
        got = on(device, lambda *given: results(steps_triton, *given, dtype))(x, norm, linear)
    assert "linear_lowrank_forward" not in launched and "lora_linear_backward_low_rank" not in launched
    for one, rough, true in zip(got, low, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(one, true, rtol=1e-9, atol=1e-9)
        else:
            assert_as_exact_as(one, rough, true, 3)


def test_a_product_of_its_own_reads_such_a_weight_where_it_lies(device):
    """In the first and the last block q, k and v are not made by `enter_project`."""
    x, _, linear = operands("q, k, v", torch.bfloat16)
    s, rest = torch.randn(ROWS, 15).bfloat16(), (linear.lora_b, 0.7, None, 3)
    with running("triton", device, ("bounds",)):
        results = [
            on(device, linear_lowrank)(x, w, linear.bias, s, *rest) for w in (linear.weight, linear.weight.clone())
        ]
    assert linear.weight.stride(0) > linear.weight.shape[1] and torch.equal(*results)


@pytest.mark.parametrize("case, rows", [("q, k, v", (32, 32, 32)), ("q twice as wide", (48, 24, 24))])
def test_b_is_written_anew_before_each_use(case, rows):
    _, _, linear = operands(case, torch.float32)
    linear.lora_b.mul_(2)
    beside = write_factor(linear)[:, linear.weight.shape[1] :]
    assert torch.equal(beside[:, :15], linear.scaling * torch.block_diag(*linear.lora_b.split(rows)))
    assert not beside[:, 15:].any()


def adapted():
    linear = LoraLinear(torch.randn(48, 16), torch.randn(48), ("q", "k", "v"))
    linear.add_adapter(LoraConfig(r=4))
    torch.nn.init.normal_(linear.lora_b)
    return linear


def test_a_layer_keeps_its_weight_once_and_says_the_same():
    linear, x = adapted(), torch.randn(5, 16)
    expected, state = linear(x), {name: t.clone() for name, t in linear.state_dict().items()}
    linear.join()
    assert linear.operands().joined.data_ptr() == linear.weight.data_ptr()
    torch.testing.assert_close(linear(x), expected)
    assert all(torch.equal(t, state[name]) for name, t in linear.state_dict().items())


def test_what_moves_or_copies_a_layer_leaves_its_room_behind():
    linear = adapted()
    linear.join()
    assert copy.deepcopy(linear).operands().joined is None
    assert linear.double().operands().joined is None


@pytest.mark.parametrize(
    "linear", [LoraLinear(torch.randn(48, 16), None, ("q", "k", "v")), LoraLinear(torch.randn(8, 12), None, ("fc1",))]
)
def test_without_an_adapter_or_at_an_odd_width_there_is_no_room(linear):
    if linear.in_features == 12:
        linear.add_adapter(LoraConfig(r=4, target_modules=("fc1",)))
    linear.join()
    assert linear.joined is None
