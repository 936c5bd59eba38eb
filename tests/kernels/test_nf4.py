"""nf4_linear is lora_linear over the unpacked weight, and keeps and copies nothing of its size."""

import pytest
import torch
from running import moved, on, running
from torch.utils._python_dispatch import TorchDispatchMode

from u2a_fast.kernels import linear_lowrank, lora_linear, nf4_linear, pack_nf4, unpack_nf4
from u2a_fast.memory_counts import saved_bytes

pytest.importorskip("bitsandbytes")
SHAPE, GROUPS, RANK, SCALING = (48, 80), 3, 2, 0.7


def operands(dtype, projected):
    """`(x, packed, absmax, options)`; every floating operand needs its gradient."""
    torch.manual_seed(0)
    draw = lambda *shape, dtype=dtype: torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    low = torch.float64 if dtype == torch.float64 else torch.float32  # adapters and trained biases are wide
    options = {"bias": draw(48, dtype=low), "lora_b": draw(48, RANK, dtype=low)}
    options |= {"s": draw(2, 5, 6)} if projected else {"lora_a": draw(GROUPS * RANK, 80, dtype=low)}
    return draw(2, 5, 80), *pack_nf4(torch.randn(SHAPE)), options


def plain(x, packed, absmax, lead, bias, lora_b, s=None, lora_a=None, dropout=0.0):
    weight = unpack_nf4(packed, absmax, SHAPE, x.dtype)
    if s is not None:
        return linear_lowrank(x, weight, bias, s, lora_b, SCALING, groups=GROUPS, lead=lead)
    return lora_linear(x, weight, bias, lora_a, lora_b, SCALING, groups=GROUPS, lead=lead, dropout=dropout)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("projected, dropout, lead", [(False, 0.0, 1), (False, 0.4, 2), (True, 0.0, 1), (True, 0.0, 2)])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_values_and_gradients_are_those_of_the_unpacked_weight(
    dtype, limit, projected, dropout, lead, implementation, device
):
    x, packed, absmax, options = operands(dtype, projected)
    dropped = {} if projected else {"dropout": dropout}
    results = []
    for function in (nf4_linear, plain):
        torch.manual_seed(1)
        extra = {"shape": SHAPE, "scaling": SCALING, "groups": GROUPS} if function is nf4_linear else {}
        with running(implementation, device):
            y = on(device, function)(x, packed, absmax, lead=lead, **extra, **options, **dropped)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *options.values()])])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 32), (4, 64), (7, 96), (7, 95), (5, 33), (30, 2), (1, 1)])
def test_unpacked_weights_are_levels_of_their_blocks(shape, dtype, device):
    """In every block, each weight is the nearest of NormalFloat's 16 levels, whatever the width of a row."""
    weight = torch.randn(shape)
    packed, absmax = on(device, pack_nf4)(weight)
    unpacked = on(device, unpack_nf4)(packed, absmax, shape, dtype).float().flatten()
    scale = absmax.repeat_interleave(64)[: weight.numel()]
    widest = 0.1520  # half of the widest gap between levels
    assert ((unpacked - weight.flatten()).abs() <= scale * (widest + 2.0**-8)).all()
    assert len((unpacked / scale).mul(50).round().unique()) <= 16


def test_only_what_gradients_need_is_kept(device):
    x, packed, absmax, options = moved(operands(torch.float32, False), device)
    frozen = saved_bytes(lambda: nf4_linear(x, packed, absmax, SHAPE), [x, packed, absmax])
    assert frozen == 0
    adapted = saved_bytes(
        lambda: nf4_linear(x, packed, absmax, SHAPE, groups=GROUPS, **options), [x, packed, absmax, *options.values()]
    )
    assert adapted < packed.numel() < SHAPE[0] * SHAPE[1]


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_unpacking_copies_no_table_to_the_device(device):
    _, packed, absmax, _ = moved(operands(torch.float32, False), device)
    with Called() as called:
        unpack_nf4(packed, absmax, SHAPE, torch.bfloat16)
    assert set(called.names) == {"bitsandbytes::dequantize_4bit", "aten::view"}


@pytest.mark.parametrize("adapted", [False, True])
def test_the_result_can_be_changed_in_place(adapted, device):
    """As rotary positions do, which turn q and k where this product has put them."""
    x, packed, absmax, options = moved(operands(torch.float32, False), device)
    options = {"groups": GROUPS, **options} if adapted else {"bias": options["bias"]}
    y = nf4_linear(x, packed, absmax, SHAPE, **options)
    (expected,) = torch.autograd.grad((2 * y).sum(), x)
    y = nf4_linear(x, packed, absmax, SHAPE, **options)
    assert torch.equal(torch.autograd.grad(y.flatten(0, 1).mul_(2).sum(), x)[0], expected)


def test_the_backward_is_in_the_dtype_of_its_forward(device):
    x, packed, absmax, _ = operands(torch.float32, False)
    gradients = []
    for enabled in (False, True):
        y = on(device, nf4_linear)(x, packed, absmax, SHAPE)
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            gradients += torch.autograd.grad(y.sum(), x)
    assert torch.equal(*gradients)
    with torch.autocast(device.type, torch.bfloat16):
        assert on(device, nf4_linear)(x, packed, absmax, SHAPE).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"packed": torch.zeros(1920, 1)}, TypeError, "must be uint8"),
        ({"shape": (48, 81)}, ValueError, "3840 weights, which is not 48 x 81"),
        ({"lora_b": torch.ones(48, 2)}, ValueError, "either s or lora_a"),
        ({"s": torch.ones(1, 2)}, ValueError, "either s or lora_a"),
        ({"absmax": torch.ones(59)}, ValueError, "64 of 3840 weights each, not 59"),
        ({"lora_a": torch.ones(2, 79), "lora_b": torch.ones(48, 2)}, ValueError, r"lora_a must be \[2, 80\]"),
        ({"dropout": 1.5}, ValueError, "below 1, not 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    packed, absmax = pack_nf4(torch.randn(SHAPE))
    with pytest.raises(error, match=message):
        nf4_linear(**{"x": torch.ones(1, 80), "packed": packed, "absmax": absmax, "shape": SHAPE} | change)
