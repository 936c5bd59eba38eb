"""Measures are those of the answers, whatever their scale."""

import math

import pytest
import torch

from u2a_fast.metrics import score, written


def numbers():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    return labels + torch.randn(20, 2, generator=generator, dtype=torch.float64) / 2, labels


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0), (5, 2000), (1000, 1.6e9), (1e-6, -3)])
def test_r2_depends_on_no_unit_and_no_origin(scale, shift):
    answers, labels = numbers()
    left, spread = (labels - answers).square().sum(dim=0), (labels - labels.mean(dim=0)).square().sum(dim=0)
    found = score("regression", answers * scale + shift, labels * scale + shift)
    assert found["r2"] == pytest.approx((1 - left / spread).mean().item(), abs=1e-5)
    assert found["mae"] == pytest.approx(scale * (labels - answers).abs().mean().item(), rel=1e-4)


def test_r2_is_of_the_numbers_that_differ_between_samples():
    answers, labels = numbers()
    labels[:, 1] = 7.0
    first = score("regression", answers[:, :1], labels[:, :1])["r2"]
    assert score("regression", answers, labels)["r2"] == pytest.approx(first)
    assert math.isnan(score("regression", answers[:, 1:], labels[:, 1:])["r2"])


def test_ranks_are_told_apart_where_probabilities_round_to_one():
    certain = torch.tensor([60.0, 50.0, 40.0, 30.0, -200.0])
    labels = torch.tensor([1, 1, 0, 1, 0])
    two = torch.stack([torch.zeros(5), certain], dim=1)
    assert score("single_label_classification", two, labels)["auroc"] == pytest.approx(5 / 6)
    found = score("multi_label_classification", certain[:, None], labels[:, None])
    assert found["map"] == pytest.approx((1 + 1 + 3 / 4) / 3)


def test_errors_in_small_units_keep_their_digits():
    assert [written("rmse", value, 4) for value in (0, 1.23456e-5, 0.5, 12345.678)] == [
        "0.0000", "1.235e-05", "0.5000", "12345.6780"
    ]  # fmt: skip
    assert written("accuracy", 0.00012, 3) == "0.000" and written("mae", float("nan"), 3) == "nan"
