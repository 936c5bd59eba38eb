"""One linear with LoRA, forward and backward, over the frozen linear alone.

    pytest benches/test_lora_linear.py --benchmark-only -s

1,576 rows (a batch of 8 pictures of 197 rows). The floor is the frozen linear: forward and dX, no gradient for itself.
Arms: plain aten autograd in two spellings, PEFT, PEFT under torch.compile (at one rank: compiling takes longer than all
else here), ours. On a GPU each call has other inputs, so that none lies in L2 still.
"""

import peft
import pytest
import torch
from arms import DEVICE, FAST, best, hold, measure, nbytes, rotating
from torch import nn
from torch.nn import functional as F

from u2a_fast import kernels

ROWS, ROUNDS, COMPILED_RANK = 1576, 25, 16
SHAPES, RANKS = [(768, 768), (768, 3072), (3072, 768)], [8, 16, 64, 128]
ATEN = ("aten", "aten addmm", "peft")


class PeftLinear(nn.Module):
    """A module with one linear that PEFT wraps."""

    def __init__(self, weight, bias):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], device=DEVICE, dtype=weight.dtype)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)

    def forward(self, x):
        return self.linear(x)


def with_peft(weight, bias, a, b):
    rank = len(a)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["linear"])
    wrapped = peft.get_peft_model(PeftLinear(weight, bias), config, autocast_adapter_dtype=False).train()
    linear = wrapped.base_model.model.linear
    with torch.no_grad():
        linear.lora_A["default"].weight.copy_(a)
        linear.lora_B["default"].weight.copy_(b)
    return wrapped


def linears(columns, outputs, rank, dtype):
    """Name -> function of x; all but the frozen linear compute the same."""
    weight, bias = torch.randn(outputs, columns, device=DEVICE, dtype=dtype) / columns**0.5, torch.randn(outputs)
    bias = bias.to(DEVICE, dtype)
    a = (torch.randn(rank, columns, device=DEVICE) / columns**0.5).requires_grad_()
    b = (torch.randn(outputs, rank, device=DEVICE) * 0.02).requires_grad_()

    def addmm(x):
        return torch.addmm(F.linear(x, weight, bias), x @ a.to(dtype).t(), b.to(dtype).t(), alpha=2.0)

    return {
        "frozen": lambda x: F.linear(x, weight, bias),
        "aten": lambda x: F.linear(x, weight, bias) + 2.0 * F.linear(F.linear(x, a.to(dtype)), b.to(dtype)),
        "aten addmm": addmm,
        "peft": with_peft(weight, bias, a, b),
        "ours": lambda x: kernels.lora_linear(x, weight, bias, a, b, 2.0),
    }


def time_linear(benchmark, columns, outputs, rank, rounds, rows=ROWS, compiled=False):
    arms = linears(columns, outputs, rank, FAST)
    if compiled:
        arms["peft compiled"] = torch.compile(arms["peft"])

    def inputs():
        x = torch.randn(rows, columns, device=DEVICE, dtype=FAST, requires_grad=True)
        return x, torch.randn(rows, outputs, device=DEVICE, dtype=FAST)

    x, dy = inputs()
    expected = arms["aten"](x).float()
    for name in arms.keys() - {"frozen"}:
        assert (arms[name](x).float() - expected).norm() < 0.01 * expected.norm()
    turns = rotating(inputs, nbytes(x, dy))

    def run(linear):
        x, dy = next(turns)
        linear(x).backward(dy)

    frozen, low_rank = 4 * rows * columns * outputs, 6 * rows * rank * (columns + outputs)
    moved = x.itemsize * (2 * columns * outputs + 3 * rows * (columns + outputs))
    steps = {name: (lambda linear=linear: run(linear)) for name, linear in arms.items()}
    flops = dict.fromkeys(arms, frozen + low_rank) | {"frozen": frozen}
    facts = {"shape": f"{columns} -> {outputs}", "rank": rank, "real_rows": rows, "bytes": moved}
    return measure(benchmark, steps, "frozen", rounds, useful_flops=flops, **facts)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def test_lora_linear(benchmark, shape, rank):
    rows = time_linear(benchmark, *shape, rank, ROUNDS, compiled=rank == COMPILED_RANK)
    case, ours, frozen = f"lora_linear {shape[0]} -> {shape[1]}, r {rank}", rows["ours"], rows["frozen"]
    figures = {f"{case}: over frozen": ours["ratio"]}
    hold(benchmark, figures)
    # "never slower" means: not by more than the noise
    aten = best(rows, ATEN)
    hold(benchmark, {f"{case}: over the best aten arm": ours["median_s"] / aten}, frozen["noise"])


def test_smoke(benchmark):
    time_linear(benchmark, 32, 48, 4, 2, rows=16)
