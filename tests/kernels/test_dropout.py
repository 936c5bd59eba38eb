"""Dropout on the way to lora_a: which elements are dropped, and by which seed."""

import pytest
import torch
from linear_cases import Case, operands
from triton_interpreter import interpreted

from u2a_fast.kernels import lora_linear, set_backend
from u2a_fast.kernels.dropout import kept


def test_every_backend_drops_the_same_elements():
    x = torch.ones(5, 300)
    eye, zero = torch.eye(300), torch.zeros(300, 300)
    results = []
    for implementation in ("reference", "torch", "triton"):
        given = {"x": x, "weight": zero, "bias": None, "lora_a": eye, "lora_b": eye, "scaling": 1.0}
        given |= {"dropout": 0.25, "seed": 2**40 + 3}
        if implementation == "triton":
            with interpreted():
                results.append(lora_linear(**given))
        else:
            set_backend(implementation)
            results.append(lora_linear(**given))
    expected = kept(5, 300, 0.25, torch.tensor(2**40 + 3)) / 0.75
    for y in results:
        torch.testing.assert_close(y, expected)


def test_dropout_keeps_the_right_share_and_seeds_rows_and_columns_are_independent():
    p, shape = 0.3, (1000, 500)
    masks = torch.stack([kept(*shape, p, torch.tensor(seed)).double() for seed in (0, 1, 2**33)])
    standard_error = (p * (1 - p) / masks[0].numel()) ** 0.5
    assert ((masks.mean((1, 2)) - (1 - p)).abs() < 4 * standard_error).all()
    centred = (masks - (1 - p)) / (p * (1 - p)) ** 0.5
    shifted = [(centred[0], centred[1]), (centred[0], centred[2]), (centred[0][1:], centred[0][:-1])]
    shifted += [(centred[0][:, 1:], centred[0][:, :-1]), (centred[0][1:, 1:], centred[0][:-1, :-1])]
    for one, other in shifted:
        assert (one * other).mean().abs() < 5 / one.numel() ** 0.5
    assert 0.8 < masks[0].sum(0).var() / (shape[0] * p * (1 - p)) < 1.25
    assert 0.8 < masks[0].sum(1).var() / (shape[1] * p * (1 - p)) < 1.25


def test_the_seed_comes_from_torchs_generator_unless_it_is_given():
    given = operands(Case(dropout=0.5), torch.float32) | {"seed": None}
    first, second = lora_linear(**given), lora_linear(**given)
    torch.manual_seed(0)
    assert torch.equal(lora_linear(**given), first)
    assert not torch.equal(first, second)
    for seed in (torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        assert torch.equal(lora_linear(**given | {"seed": 3}), lora_linear(**given | {"seed": seed}))
    assert not torch.equal(lora_linear(**given | {"seed": 3}), lora_linear(**given | {"seed": 4}))
    lora_linear(**given | {"seed": 2**64 - 1})
    for seed in (torch.tensor(3.0), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="seed must be one whole number"):
            lora_linear(**given | {"seed": seed})
