"""A linear of several roles says what PEFT says of each, whatever their widths, and can be taken apart."""

import copy
import pickle

import pytest
import torch
from torch import nn

from u2a_fast import LoraConfig
from u2a_fast.encoders.build import stack_linears
from u2a_fast.encoders.frozen import quantize_weight
from u2a_fast.kernels import linear_lowrank
from u2a_fast.lora import LoraLinear
from u2a_fast.norms import operands

WIDTH, SHARED = 16, 8  # inputs, outputs of k and of v
NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}


class Projections(nn.Module):
    """q, `lead` times as wide as k and v."""

    def __init__(self, lead):
        super().__init__()
        for role, name in NAMES.items():
            setattr(self, name, nn.Linear(WIDTH, SHARED * (lead if role == "q" else 1)))

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in NAMES.values()], dim=-1)


def adapted(lead, targets, dtype=torch.float64):
    """PEFT's and ours over the same weights and factors."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(lead)
    model = Projections(lead).to(dtype)
    ours = stack_linears([getattr(model, name) for name in NAMES.values()], tuple(NAMES))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[NAMES[role] for role in targets])
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    ours.add_adapter(LoraConfig.read(config))
    factors = [
        [getattr(model, NAMES[role]).get_parameter(f"lora_{m}.default.weight") for role in targets] for m in "AB"
    ]
    for own, parts in zip((ours.lora_a, ours.lora_b), factors, strict=True):
        for part in parts:
            nn.init.normal_(part)
        own.data = torch.cat([part.detach() for part in parts])
    return theirs, ours, factors


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("q",), ("q", "v"), ("k",)], ids="+".join)
@pytest.mark.parametrize("lead", [1, 2, 3])
def test_values_and_gradients_are_those_of_peft(lead, targets):
    theirs, ours, factors = adapted(lead, targets)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
    for run, expected in ((ours, theirs), (lambda x: ours.after_norm(operands(norm), x)[0], lambda x: theirs(norm(x)))):
        y, exact = run(x), expected(x)
        dy = torch.randn_like(y)
        dx, da, db = torch.autograd.grad(y, (x, ours.lora_a, ours.lora_b), dy)
        true_x, *true = torch.autograd.grad(exact, (x, *factors[0], *factors[1]), dy)
        true = [torch.cat(true[: len(targets)]), torch.cat(true[len(targets) :])]
        for got, right in zip((y, dx, da, db), (exact, true_x, *true), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [None, "int8", "int8_w8a8", "nf4"])
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("q", "v"), ("o",)], ids="+".join)
@pytest.mark.parametrize("lead", [1, 3])
def test_q_of_a_few_rows_and_k_and_v_of_all_are_those_of_the_whole(lead, targets, mode):
    if mode == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    rows = (lead * SHARED, SHARED, SHARED)
    linear = LoraLinear(torch.randn(sum(rows), WIDTH), torch.randn(sum(rows)), ("q", "k", "v"), widths=rows)
    linear.add_adapter(LoraConfig(r=3, target_modules=targets))
    if linear.has_adapter:
        nn.init.normal_(linear.lora_b)
    if mode is not None:
        linear.store(*quantize_weight(linear.weight.detach(), mode))
        linear.quantize_input = mode == "int8_w8a8"
    norm, x, places = nn.LayerNorm(WIDTH), torch.randn(2, 5, WIDTH), torch.tensor([7, 1, 2])
    whole, _ = linear.after_norm(operands(norm), x)
    assert linear.is_splittable and (linear.lead, linear.widths) == (lead, rows)
    q, kv, residual = linear.split_after_norm(operands(norm), x, places)
    torch.testing.assert_close(q[0], whole.flatten(0, 1)[places, : rows[0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kv, whole[..., rows[0] :], rtol=1e-5, atol=1e-5)
    assert torch.equal(residual[0], x.flatten(0, 1)[places])


def test_packed_weights_are_taken_apart_where_no_block_lies_in_q_and_in_k():
    for rows, apart in (((12, 4, 4), True), ((10, 5, 5), False)):
        linear = LoraLinear(torch.randn(20, WIDTH), None, ("q", "k", "v"), widths=rows)
        linear.store(torch.zeros(160, 1, dtype=torch.uint8), torch.ones(5))
        assert linear.is_splittable == apart, rows


@pytest.mark.parametrize("widths", [(10, 6, 4), (4, 8, 8), (12, 8, 0), (10, 4, 4), (8, 8, 8), (20,), (0, 10, 10)])
def test_other_widths_are_refused(widths):
    with pytest.raises(ValueError, match=r"widths of q, k, v must be equal.* the weight's 20 rows, not"):
        LoraLinear(torch.randn(20, 4), None, ("q", "k", "v"), widths=widths)


@pytest.mark.parametrize("targets, roles", [(("fc1",), ("gate", "up")), (("gate", "down"), ("gate",)), (("q",), ())])
def test_fc1_of_a_gated_mlp_is_gate_and_up(targets, roles):
    linear = LoraLinear(torch.randn(12, 4), None, ("gate", "up"))
    linear.add_adapter(LoraConfig(r=2, target_modules=targets))
    assert linear.adapted == roles
    if roles:
        nn.init.normal_(linear.lora_b)
        x, (a, b) = torch.randn(3, 4), (linear.lora_a.detach(), linear.lora_b.detach())
        y = linear_lowrank(x, linear.weight[: len(b)], None, x @ a.t(), b, linear.scaling, groups=len(roles))
        torch.testing.assert_close(linear(x)[:, : len(b)], y)


def joined():
    """q, k and v with adapters, their weight where it has room beside it."""
    linear = LoraLinear(torch.randn(3 * WIDTH, WIDTH), None, ("q", "k", "v"))
    linear.add_adapter(LoraConfig(r=4, target_modules=("q", "k", "v")))
    linear.join()
    assert linear.operands().joined is not None
    return linear


@pytest.mark.parametrize("targets", [("q", "k", "v"), ("o",)], ids="+".join)
def test_other_adapters_do_not_fill_the_room_of_those_before(targets):
    linear = joined()
    linear.add_adapter(LoraConfig(r=9, target_modules=targets))
    assert linear.joined is None
    linear.join()
    assert (linear.joined is None) == (targets == ("o",))
    linear.remove_adapter()
    assert linear.joined is None


def test_a_copy_holds_its_weight_and_no_room_beside_it():
    linear = joined()
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert copied.joined is None and torch.equal(copied.weight, linear.weight)
    assert linear.operands().joined is not None
