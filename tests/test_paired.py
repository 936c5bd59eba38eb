"""A difference between models comes with an interval that means something, in the measure that reports rank by."""

import numpy as np
import pytest
import torch

from u2a_fast.metrics import headline, score
from u2a_fast.paired import difference, from_sums, tally

TASKS = ["single_label_classification", "multi_label_classification", "regression"]


def answers(task, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 3, generator=generator)
    noisy = logits + torch.randn(n, 3, generator=generator)
    labels = {
        "single_label_classification": noisy.argmax(dim=1),
        "multi_label_classification": (noisy > 0.5).float(),
        "regression": noisy,
    }
    return logits, labels[task]


@pytest.mark.parametrize("task", TASKS)
def test_tallies_of_the_samples_that_count_add_up_to_the_measure_of_the_report(task):
    logits, labels = answers(task)
    counted = torch.arange(40) % 3 > 0
    scores = score(task, logits[counted], labels[counted])
    found = tally(task, logits, labels, counted).numpy()
    assert np.array_equal(np.isnan(found).any(axis=1), ~counted.numpy())
    measure = headline(scores)
    total = from_sums(measure, np.nansum(found, axis=0), int(counted.sum()))
    assert total == pytest.approx(scores[measure], abs=1e-5)


def test_large_numbers_are_measured_as_small_ones():
    (logits, labels), counted = (x.double() for x in answers("regression")), torch.arange(40) % 3 > 0
    found = (tally("regression", logits + shift, labels + shift, counted) for shift in (0, 1e7))
    plain, shifted = (from_sums("r2", np.nansum(rows.numpy(), axis=0), int(counted.sum())) for rows in found)
    assert shifted == pytest.approx(plain, abs=1e-6)


def test_a_label_that_nobody_has_counts_as_in_the_report():
    logits, labels = answers("multi_label_classification")
    logits[:, 1], labels[:, 1] = -9.0, 0.0
    found = tally("multi_label_classification", logits, labels, torch.ones(40, dtype=torch.bool)).numpy()
    expected = score("multi_label_classification", logits, labels)["macro_f1"]
    assert from_sums("macro_f1", found.sum(axis=0), 40) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_is_that_of_the_reports_and_models_that_agree_have_no_interval(task):
    everybody, found, scores = torch.ones(40, dtype=torch.bool), {0: [], 1: []}, {0: [], 1: []}
    for seed in range(3):
        logits, labels = answers(task, seed=seed)
        for model, said in enumerate((logits, logits.roll(1, dims=0))):
            row = score(task, said, labels)
            found[model].append(tally(task, said, labels, everybody).numpy())
            scores[model].append(row[headline(row)])
    measure = headline(row)
    mean, low, high = difference(measure, found[0], found[1])
    assert mean == pytest.approx(np.mean(scores[0]) - np.mean(scores[1]), abs=1e-4)
    assert low < mean < high
    assert difference(measure, found[1], found[1]) == (0.0, 0.0, 0.0)
    back = difference(measure, found[1], found[0])
    assert back[0] == -mean and back[1:] == pytest.approx((-high, -low))


def right(chances, draw, common=None):
    """[n, 1] of right answers; samples that `common` calls easy are right for everybody."""
    found = draw.random(len(chances)) < chances
    return (found if common is None else found | common).astype(float)[:, None]


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Two models of 0.75 and 0.70 on five test splits of 100; seeds move a model by 0.03."""
    draw, held, runs = np.random.default_rng(0), 0, 100
    for _ in range(runs):
        ours, theirs = [], []
        for _ in range(5):
            ours.append(right(np.full(100, 0.75 + 0.03 * draw.normal()), draw))
            theirs.append(right(np.full(100, 0.70 + 0.03 * draw.normal()), draw))
        _, low, high = difference("accuracy", ours, theirs)
        held += low <= 0.05 <= high
    assert 0.88 * runs <= held <= runs


def test_pairing_makes_the_interval_narrower_where_the_same_samples_are_easy():
    draw = np.random.default_rng(0)
    easy = draw.random(400) < 0.7
    ours, theirs = (right(np.full(400, chance), draw, easy) for chance in (0.3, 0.2))
    _, low, high = difference("accuracy", [ours], [theirs])
    _, wide_low, wide_high = difference("accuracy", [draw.permutation(ours)], [draw.permutation(theirs)])
    assert high - low < 0.8 * (wide_high - wide_low)


def test_only_samples_that_count_for_both_are_compared():
    ours, theirs = np.array([[1.0], [np.nan], [1.0], [1.0]]), np.array([[0.0], [1.0], [np.nan], [0.0]])
    assert difference("accuracy", [ours], [theirs]) == (1.0, 1.0, 1.0)
    assert difference("accuracy", [ours, ours], [theirs, np.full_like(theirs, np.nan)]) == (1.0, 1.0, 1.0)
    assert np.isnan(difference("accuracy", [ours], [np.full_like(theirs, np.nan)])).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [(0.1, 0.4, 1.0), (101.3, 105.7), (3.0, 3.0)])
def test_resamples_whose_numbers_are_all_the_same_have_no_r2(labels):
    labels, counted = torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool)
    near, far = (tally("regression", labels[:, None] + error, labels, counted).numpy() for error in (0.1, 0.2))
    found = np.array(difference("r2", [near], [far]))
    assert np.isnan(found).all() if len(set(labels.tolist())) == 1 else (np.abs(found) < 2).all()
