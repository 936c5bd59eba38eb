"""Rows laid end to end: whatever the padding, every row comes back to its place."""

import itertools

import pytest
import torch
from running import CPU, moved

from u2a_fast.layout import dense, layout_of, of_plan, plan_of
from u2a_fast.padding import padding_of

MASKS = {
    "none": None,
    "at the end": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    "on the left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
    "nobody": torch.zeros(0, 4),
}


def case(name, device):
    mask = None if MASKS[name] is None else torch.as_tensor(MASKS[name], device=device).bool()
    tokens = torch.randn(4 if mask is None else len(mask), 4, 3)
    return moved(tokens, device), mask, padding_of(mask)


@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("name", MASKS)
def test_unpacking_undoes_packing(name, suffix, device):
    tokens, mask, padding = case(name, device)
    learned = moved(torch.randn(1, suffix, 3), device)  # the same for every sample
    layout = layout_of(tokens, padding, suffix)
    rows = layout.pack(tokens)
    rows = layout.join(rows, learned) if suffix else rows
    back = layout.unpack(rows, tokens.shape[:2])
    expected = tokens if mask is None else torch.where(mask[:, :, None], tokens, 0)
    assert torch.equal(back[:, :4], expected)
    assert torch.equal(back[:, 4:], learned.expand(len(tokens), -1, -1))


@pytest.mark.parametrize("name", ["at the end", "on the left", "holes"])
def test_no_padding_is_among_the_rows_and_samples_of_one_length_stand_together(name, device):
    tokens, mask, padding = case(name, device)
    layout = layout_of(tokens, padding, suffix=2)
    assert sum(group.samples * (group.keys - 2) for group in layout.groups) == int(mask.sum())
    assert layout.pack(tokens).shape == (1, int(mask.sum()), 3)
    sizes = [group.keys for group in layout.groups]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("last", [False, True])
def test_the_rows_that_are_read_are_a_token_and_the_learned_rows_of_each_sample(name, last, device):
    tokens, mask, padding = case(name, device)
    learned = moved(torch.randn(len(tokens), 2, 3), device)  # of each sample its own
    layout = layout_of(tokens, padding, suffix=2)
    rows = layout.join(layout.pack(tokens), learned)
    places, groups = layout.read(last, tokens.device)
    read = layout.of_each(rows.reshape(-1, 3)[places][None], 3)
    for i, sample in enumerate(tokens):
        own = sample if mask is None else sample[mask[i]]
        assert torch.equal(read[i], torch.stack([own[-1 if last else 0], *learned[i]]))
    assert all(group.queries == 3 for group in groups)


def test_a_sample_without_a_real_token_keeps_its_first():
    mask = torch.tensor([[False, False], [True, True]])
    layout = layout_of(torch.randn(2, 2, 3), padding_of(mask))
    assert [tuple(group) for group in layout.groups] == [(1, 1, 1), (1, 2, 2)]


def test_static_shapes_keep_their_padding():
    mask = torch.tensor([[True, False], [True, True]])
    padding = padding_of(mask, static=True)
    layout = layout_of(torch.randn(2, 2, 3), padding, suffix=1)
    assert layout.groups == dense(2, 2, 1).groups and layout.lengths is padding.lengths


@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("name", ["at the end", "on the left", "holes"])
def test_a_plan_says_where_the_real_rows_of_those_who_are_there_lie(name, suffix):
    tokens, mask, _ = case(name, CPU)
    here = torch.tensor([True, False, True, True])
    layout = of_plan(*plan_of(mask, here, 4, suffix, parts=4))
    ends, at = layout.groups.keys.tolist(), layout.places
    packed = layout.pack(tokens)[0]
    rows = (
        torch.full((ends[-1], 3), float("nan"))
        .index_copy(0, at.rows, packed)
        .index_copy(0, at.learned, torch.arange(4.0).repeat_interleave(suffix)[:, None].expand(-1, 3))
    )
    for sample in range(4):
        own = rows[ends[sample] : ends[sample + 1]]
        real = tokens[sample][mask[sample]] if here[sample] else tokens[sample][:0]
        assert torch.equal(own, torch.cat([real, torch.full((suffix, 3), float(sample))]))
        if here[sample]:
            assert torch.equal(rows[at.starts[sample]], real[0]) and torch.equal(rows[at.ends[sample]], real[-1])
    assert not rows.isnan().any()  # spare rows too
    assert max(b - a for a, b in itertools.pairwise(ends)) <= layout.groups.most_keys


def test_plans_of_many_batches_have_few_sizes():
    generator, sizes = torch.Generator().manual_seed(0), set()
    for _ in range(100):
        lengths = torch.randint(1, 33, (16,), generator=generator)
        here = torch.rand(16, generator=generator) < 0.7
        sizes.add(plan_of(torch.arange(32) < lengths[:, None], here, 32, 1, parts=16)[1])
    assert len({size.tokens for size in sizes}) == len(sizes) <= 8
