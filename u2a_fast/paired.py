"""Whether one model is better than another: paired differences, with an interval over test samples and seeds.

Accuracy, macro F1 and R2 follow from sums over samples. A sample's tally is what it adds to them: a resample of the
test split is then a product with weights, and what two models said of the same samples is resampled together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TALLIES = "tallies.safetensors"  # in the folder of an evaluation: a tally for each scenario
RESAMPLES, LEVEL = 2000, 0.95
AT_ONCE = 2**22  # weights

Difference = tuple[float, float, float]  # mean over seeds, and the ends of its interval


def tally(problem_type: str, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """What each of n samples adds to the sums that `from_sums` takes: `[n, K]`, NaN where `counted` `[n]` is False.

    K is 1 for classes (right or not), 3 C for several labels (hits, false alarms, misses) and for numbers (squared
    error, square, value; in fp64 and less their mean).
    """
    if problem_type == "single_label_classification":
        found = (logits.argmax(dim=1) == labels).float()[:, None]
    elif problem_type == "multi_label_classification":
        said, true = logits.sigmoid() > 0.5, labels.view_as(logits) > 0.5
        found = torch.cat([said & true, said & ~true, ~said & true], dim=1).float()
    else:
        true = labels.view_as(logits).double()
        error, true = logits.double() - true, true - true[counted].mean(dim=0)
        found = torch.cat([error.square(), true.square(), true], dim=1)
    return torch.where(counted[:, None], found, torch.nan)


def from_sums(measure: str, sums: np.ndarray, count: int) -> np.ndarray:
    """The accuracy, `macro_f1` or `r2` of `count` samples from the sum of their tallies: `[.., K]` -> `[..]`.

    R2 is NaN where all numbers are the same, as in resamples of few.

    >>> float(from_sums("accuracy", np.array([3.0]), 4))
    0.75
    """
    if measure == "accuracy":
        return sums[..., 0] / count
    first, second, third = np.split(sums, 3, axis=-1)
    if measure == "macro_f1":
        return (2 * first / np.maximum(2 * first + second + third, 1)).mean(axis=-1)
    spread = second - third**2 / count
    alike = spread <= 4 * count * np.finfo(float).eps * second  # rounding is all that is left of it
    return (1 - first / np.where(alike, np.nan, spread)).mean(axis=-1)


def difference(measure: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Difference:
    """Ours less theirs, a tally `[n, K]` for each seed: the mean over seeds, and its 95% interval.

    Bootstrap in two stages: seeds are drawn with replacement, and from the test split of each the samples that count
    for both. That the splits of two seeds share samples is not allowed for. NaN where no sample counts for both.

    >>> right, wrong = np.ones((50, 1)), np.zeros((50, 1))
    >>> difference("accuracy", [right, right], [wrong, right])
    (0.5, 0.0, 1.0)
    """
    random = np.random.default_rng(0)
    pairs = [shared for pair in zip(ours, theirs, strict=True) if len((shared := _shared(*pair))[0])]
    if not pairs:
        return np.nan, np.nan, np.nan
    mean = np.mean([from_sums(measure, a.sum(0), len(a)) - from_sums(measure, b.sum(0), len(b)) for a, b in pairs])
    resampled = np.stack([_resampled(measure, a, b, random) for a, b in pairs])  # [seeds, RESAMPLES]
    shape = RESAMPLES, len(pairs)
    drawn = resampled[random.integers(len(pairs), size=shape), random.integers(RESAMPLES, size=shape)].mean(axis=1)
    if np.isnan(drawn).all():
        return float(mean), np.nan, np.nan
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(mean), float(low), float(high)


def _shared(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the samples that count for both."""
    both = ~np.isnan(a).any(axis=1) & ~np.isnan(b).any(axis=1)
    return a[both].astype(float), b[both].astype(float)


def _resampled(measure: str, a: np.ndarray, b: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The difference on `RESAMPLES` draws of n out of n samples."""
    count, found = len(a), []
    for start in range(0, RESAMPLES, step := max(1, AT_ONCE // count)):
        weights = random.multinomial(count, np.full(count, 1 / count), size=min(step, RESAMPLES - start))
        found.append(from_sums(measure, weights @ a, count) - from_sums(measure, weights @ b, count))
    return np.concatenate(found)
