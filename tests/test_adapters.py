"""Adapters of unlike ranks and scalings in one stacked linear: the same function, the same gradients."""

import pytest
import tiny_encoders
import torch

from u2a_fast import LoraConfig
from u2a_fast.adapters import LowRank, describe_adapters, low_ranks, restore_adapters, set_low_ranks
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.lora import LoraLinear

ROLES = ("q", "k", "v")
WIDTHS = [(6, 6, 6), (12, 6, 6)]  # of as many heads, and of fewer key heads


def stacked(widths=WIDTHS[0]):
    rows = sum(widths)
    return LoraLinear(torch.randn(rows, 5).double(), torch.randn(rows).double(), ROLES, widths=widths)


def factor(rank, scaling, width=6):
    return LowRank(torch.randn(rank, 5).double(), torch.randn(width, rank).double(), scaling)


def expected(linear, given, x):
    y = torch.nn.functional.linear(x, linear.weight, linear.bias)
    zeros = {role: x.new_zeros(len(x), width) for role, width in zip(linear.roles, linear.widths, strict=True)}
    parts = [p.scaling * x @ p.a.T @ p.b.T if (p := given.get(role)) else zeros[role] for role in linear.roles]
    return y + torch.cat(parts, dim=1)


@pytest.mark.parametrize("ranks, scalings", [((2, 2, 2), (3, 3, 3)), ((1, 4, 2), (2, 2, 2)), ((3, 1, 2), (0.5, 4, 0))])
@pytest.mark.parametrize("adapted", [ROLES, ("q", "v"), ("k",)])
@pytest.mark.parametrize("widths", WIDTHS)
def test_any_ranks_and_scalings_are_exact(widths, ranks, scalings, adapted):
    linear, x = stacked(widths), torch.randn(7, 5).double()
    each = zip(ROLES, ranks, scalings, widths, strict=True)
    given = {role: factor(rank, scaling, width) for role, rank, scaling, width in each if role in adapted}
    set_low_ranks(linear, given, dropout=0.25)
    assert linear.adapted == adapted and linear.dropout == 0.25
    torch.testing.assert_close(linear.eval()(x), expected(linear, given, x), rtol=0, atol=1e-12)
    for role, part in low_ranks(linear).items():
        found, wanted = part.scaling * part.b @ part.a, given[role].scaling * given[role].b @ given[role].a
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_filled_up_ranks_get_no_gradient_and_the_others_their_own():
    linear, x = stacked(), torch.randn(7, 5).double()
    given = {"q": factor(1, 2.0), "k": factor(3, 2.0), "v": factor(2, 2.0)}
    set_low_ranks(linear, given)
    linear(x).square().sum().backward()
    leaves = {role: (p.a.clone().requires_grad_(), p.b.clone().requires_grad_()) for role, p in given.items()}
    expected(linear, {role: LowRank(a, b, 2.0) for role, (a, b) in leaves.items()}, x).square().sum().backward()
    of_a = dict(zip(ROLES, linear.lora_a.grad.chunk(3), strict=True))
    of_b = dict(zip(ROLES, linear.lora_b.grad.chunk(3), strict=True))
    for role, (a, b) in leaves.items():
        rank = a.shape[0]
        torch.testing.assert_close(of_a[role][:rank], a.grad)
        torch.testing.assert_close(of_b[role][:, :rank], b.grad)
        assert not of_a[role][rank:].any() and not of_b[role][:, rank:].any()


def test_equal_scalings_leave_the_factors_as_they_are_and_none_removes_them():
    linear, given = stacked(), {role: factor(2, 0.3) for role in ROLES}
    set_low_ranks(linear, given)
    assert linear.scaling == 0.3
    assert all(torch.equal(low_ranks(linear)[role].b, given[role].b) for role in ROLES)
    set_low_ranks(linear, {})
    assert linear.lora_a is None and low_ranks(linear) == {}


@pytest.fixture
def encoder():
    return from_pretrained_model(tiny_encoders.build("vit"))


@pytest.mark.parametrize("name, mlp", [("vit", "fc2"), ("qwen3", "gate")])
def test_a_description_brings_back_shapes_and_scalings(name, mlp):
    encoder = from_pretrained_model(tiny_encoders.build(name))
    for linear in encoder.blocks[0].linears:
        linear.add_adapter(LoraConfig(r=2, lora_alpha=0.7, lora_dropout=0.5, target_modules=("q", "v", mlp)))
    described = describe_adapters(encoder)
    assert described["blocks.0.qkv"] == {"roles": ["q", "v"], "r": 2, "scaling": 0.35, "dropout": 0.5}
    shapes = {name: p.shape for name, p in encoder.named_parameters()}
    for block in encoder.blocks:
        for linear in block.linears:
            linear.add_adapter(LoraConfig(r=3))
    restore_adapters(encoder, described)
    assert {name: p.shape for name, p in encoder.named_parameters()} == shapes
    assert describe_adapters(encoder) == described


@pytest.mark.parametrize(
    "change, message",
    [
        ({"roles": ["q", "fc1"]}, "not 'fc1'"),
        ({"roles": 3}, "blocks.0.qkv"),
        ({"r": 0}, "from 1 to 65536"),
        ({"r": "2"}, "blocks.0.qkv"),
        ({"scaling": float("nan")}, "finite"),
        ({"scaling": None}, "blocks.0.qkv"),
        ({"dropout": 2}, "lora_dropout"),
    ],
)
def test_a_damaged_description_is_refused(encoder, change, message):
    entry = {"roles": ["q"], "r": 2, "scaling": 1.0, "dropout": 0.0} | change
    with pytest.raises(ValueError, match=message):
        restore_adapters(encoder, {"blocks.0.qkv": entry})
    with pytest.raises(ValueError, match="does not have"):
        restore_adapters(encoder, {"blocks.9.qkv": entry})
    with pytest.raises(ValueError, match="describes the adapter"):
        restore_adapters(encoder, {"blocks.0.qkv": {}})
