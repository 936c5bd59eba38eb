"""Dropout on the way to lora_a: which elements are dropped, and by which seed."""

import pytest
import torch
from linear_cases import Case, operands
from running import on, running

from u2a_fast.kernels import lora_linear
from u2a_fast.kernels.dropout import kept


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_every_backend_drops_the_same_elements(implementation, device):
    x = torch.ones(5, 300)
    eye, zero = torch.eye(300), torch.zeros(300, 300)
    given = {"x": x, "weight": zero, "bias": None, "lora_a": eye, "lora_b": eye, "scaling": 1.0}
    given |= {"dropout": 0.25, "seed": 2**40 + 3}
    with running(implementation, device):
        y = on(device, lora_linear)(**given)
    torch.testing.assert_close(y, kept(5, 300, 0.25, torch.tensor(2**40 + 3)) / 0.75)


def test_dropout_keeps_the_right_share_and_seeds_rows_and_columns_are_independent(device):
    p, shape = 0.3, (1000, 500)
    masks = torch.stack([on(device, kept)(*shape, p, torch.tensor(seed)).double() for seed in (0, 1, 2**33)])
    standard_error = (p * (1 - p) / masks[0].numel()) ** 0.5
    assert ((masks.mean((1, 2)) - (1 - p)).abs() < 4 * standard_error).all()
    centred = (masks - (1 - p)) / (p * (1 - p)) ** 0.5
    shifted = [(centred[0], centred[1]), (centred[0], centred[2]), (centred[0][1:], centred[0][:-1])]
    shifted += [(centred[0][:, 1:], centred[0][:, :-1]), (centred[0][1:, 1:], centred[0][:-1, :-1])]
    for one, other in shifted:
        assert (one * other).mean().abs() < 5 / one.numel() ** 0.5
    assert 0.8 < masks[0].sum(0).var() / (shape[0] * p * (1 - p)) < 1.25
    assert 0.8 < masks[0].sum(1).var() / (shape[1] * p * (1 - p)) < 1.25


def test_the_seed_comes_from_torchs_generator_unless_it_is_given(device):
    given, linear = operands(Case(dropout=0.5), torch.float32) | {"seed": None}, on(device, lora_linear)
    first, second = linear(**given), linear(**given)
    torch.manual_seed(0)
    assert torch.equal(linear(**given), first)
    assert not torch.equal(first, second)
    for seed in (torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        assert torch.equal(linear(**given | {"seed": 3}), linear(**given | {"seed": seed}))
    assert not torch.equal(linear(**given | {"seed": 3}), linear(**given | {"seed": 4}))
    linear(**given | {"seed": 2**64 - 1})
    for seed in (torch.tensor(3.0), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="seed must be one whole number"):
            linear(**given | {"seed": seed})
