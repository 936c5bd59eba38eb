"""Who is better than whom over several seeds, and by how much beyond the noise: the tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .paired import Difference, difference
from .reports import UNIMODAL, best_single

Cell = tuple[float, float]  # mean and standard deviation (NaN: of one seed) over seeds of what the task is ranked by
LATE_FUSION = ("late fusion", "late_fusion")  # the baseline, the method
UNMEASURED = "-"  # where no sample counts


class Verdicts:
    """Differences of the headline measure between models, each with its interval.

    Args:
        table: `{method: {scenario: cell}}`, the unimodal models under `unimodal`.
        tallies: `{method or unimodal model: {scenario: a tally for each seed}}`, as `paired.difference` takes them.
        measure: what the table holds.
    """

    def __init__(
        self,
        table: Mapping[str, Mapping[str, Cell]],
        tallies: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
        measure: str,
    ):
        self.table, self.tallies, self.measure = table, tallies, measure
        self.methods = [name for name in table if name != UNIMODAL]
        self.scenarios = list(table[self.methods[0]])
        self.single = {name: mean for name, (mean, _) in table.get(UNIMODAL, {}).items()}

    def over(self, name: str, rival: str | None, scenario: str) -> Difference:
        """A method less another; where there is no rival, less the best unimodal model trained on what remains.

        NaN where nobody could learn from what remains.
        """
        asked = scenario
        if rival is None:
            rival, asked = best_single(scenario, self.single), "full"
        if rival is None:
            return np.nan, np.nan, np.nan
        return difference(self.measure, self.tallies[name][scenario], self.tallies[rival][asked])

    def best(self, scenario: str) -> list[str]:
        """The method with the best mean, and those that it is ahead of by no more than the noise; none of NaNs."""
        measured = [name for name in self.methods if not np.isnan(self.table[name][scenario][0])]
        if not measured:
            return []
        first, *rest = sorted(measured, key=lambda name: -self.table[name][scenario][0])
        return [first, *(name for name in rest if not self.over(first, name, scenario)[1] > 0)]


def markdown(found: Verdicts) -> str:
    """Scenarios by methods: what each reaches, then its differences to late fusion and to the best unimodal model."""
    rows = []
    for scenario in found.scenarios:
        cells = [found.table[name][scenario] for name in found.methods]
        rows.append([*map(_spread, cells), ", ".join(found.best(scenario))])
    text = _table(found.scenarios, [*found.methods, "best, and level with it"], rows)
    if found.single:
        single = (f"{name} {_spread(cell)}" for name, cell in found.table[UNIMODAL].items())
        text += f"\nUnimodal models trained on what remains: {', '.join(single)}.\n"
    rivals: list[str | None] = [name for name in found.methods if name in LATE_FUSION]
    for rival in rivals + ([None] if found.single else []):
        if not (others := [name for name in found.methods if name != rival]):
            continue
        text += f"\nDifference to {rival or 'the best unimodal model on what remains'}, 95% interval over test samples "
        text += "and seeds, bold where it leaves out 0:\n\n"
        rows = [[_signed(found.over(name, rival, scenario)) for name in others] for scenario in found.scenarios]
        text += _table(found.scenarios, others, rows)
    return text


def _table(scenarios: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(["scenario", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([name, *row]) + " |" for name, row in zip(scenarios, rows, strict=True)]
    return "\n".join(lines) + "\n"


def _spread(cell: Cell) -> str:
    mean, std = cell
    if math.isnan(mean):
        return UNMEASURED
    return f"{mean:.3f}" if math.isnan(std) else f"{mean:.3f} ± {std:.3f}"


def _signed(found: Difference) -> str:
    mean, low, high = found
    if math.isnan(mean):
        return UNMEASURED
    text = f"**{mean:+.3f}**" if low > 0 or high < 0 else f"{mean:+.3f}"
    return f"{text} ({low:+.3f} to {high:+.3f})"
