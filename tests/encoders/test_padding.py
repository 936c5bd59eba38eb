"""Padding anywhere is told to attention as lengths, whatever the order and wherever the mask lies."""

import pytest
import torch
from device import StandIn
from running import moved

from u2a_fast.padding import padding_of, take_rows

MASKS = {
    "at the end": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]],
    "at the start": [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]],
    "holes": [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
}


def mask_of(name, device=None):
    return torch.tensor(MASKS[name], device=device).bool()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_real_rows_come_first_and_keep_their_order(name, static, device):
    mask, tokens = mask_of(name, device), moved(torch.arange(12.0).view(3, 4, 1), device)
    padding = padding_of(mask, static=static)
    assert padding.lengths.tolist() == mask.sum(1).tolist()
    assert (padding.host_mask is None) == static and (padding.order is None) == (name == "at the end" and not static)
    ordered = tokens if padding.order is None else take_rows(tokens, padding.order)
    for row, real, length, own in zip(ordered, mask, padding.lengths.tolist(), tokens, strict=True):
        assert torch.equal(row[:length], own[real])
    if padding.order is not None:
        assert torch.equal(take_rows(ordered, padding.order.argsort(dim=1)), tokens)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3, dtype=torch.bool), torch.ones(0, 3, dtype=torch.bool)])
def test_nothing_to_say_where_nothing_is_padding(mask):
    assert padding_of(mask) is None


@pytest.mark.parametrize("name", MASKS)
def test_samples_are_selected_with_their_padding(name, device):
    rows = torch.tensor([2, 0])
    mask = mask_of(name, device)
    chosen, alone = padding_of(mask).select(rows), padding_of(mask[rows])
    for attribute in ("mask", "lengths", "host_mask"):
        assert torch.equal(getattr(chosen, attribute), getattr(alone, attribute))


def test_a_mask_that_is_known_on_the_host_is_not_fetched(monkeypatch):
    mask, stand_in = mask_of("holes"), StandIn(monkeypatch)
    stand_in.put(mask)
    with stand_in:
        padding_of(mask, mask_of("holes"))
        padding_of(mask, static=True)
        assert stand_in.copies == 0
        padding_of(mask)
    assert stand_in.waits == [] and stand_in.copies == 1
