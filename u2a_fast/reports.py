"""A report in the terminal, as a table and as pictures."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .metrics import NAMES, headline, written

Row = dict[str, Any]
BESIDE = ("majority", "std")  # what a row holds besides its measures
BASELINE = re.compile(r"(?P<scenario>.+) \[(?P<name>.+)\]")
UNIMODAL = "unimodal"
MOST_NAMES = 40  # classes whose names fit beside a confusion matrix
LONGEST_NAME = 20


def columns(rows: Sequence[Row]) -> list[str]:
    """`scenario`, the task's measures, `n`."""
    return [name for name in rows[0] if name not in BESIDE]


def with_baseline(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of a baseline as they stand in a report: `full [late fusion]`, `text only [unimodal]`."""
    return [{**row, "scenario": f"{row['scenario']} [{name}]"} for row in rows]


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """{"": the model's own rows, baseline: its rows under the plain names of the scenarios}.

    >>> by_model([{"scenario": "full"}, *with_baseline([{"scenario": "full"}], "late fusion")])
    {'': [{'scenario': 'full'}], 'late fusion': [{'scenario': 'full'}]}
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        match = BASELINE.fullmatch(row["scenario"])
        plain = {**row, "scenario": match["scenario"]} if match else row
        found.setdefault(match["name"] if match else "", []).append(plain)
    return found


def best_single(scenario: str, single: Mapping[str, float]) -> str | None:
    """The best of the unimodal models (`{"text only": score, ..}`) on what a scenario leaves, NaN being no score.

    >>> best_single("text missing", {"text only": 0.8, "image only": 0.7})
    'image only'
    """
    measured = [name for name, score in single.items() if not math.isnan(score)]
    left = [name for name in measured if scenario != f"{name.removesuffix(' only')} missing"]
    return max(left, key=lambda name: single[name], default=None)


def write_report(rows: Sequence[Row], output_dir: str | Path) -> None:
    """`report.csv` and `report.png`."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "report.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns(rows), extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, **{name: written(name, row[name], 4) for name in columns(rows) if name in NAMES}})
    models = by_model(rows)
    single = {row["scenario"]: row[headline(row)] for row in models.pop(UNIMODAL, ())}
    own = models.pop("")
    titled = {"this model": own, **models} if models else {"": own}
    plot_report(titled, single).savefig(folder / "report.png", dpi=120)


def print_report(rows: Sequence[Row], title: str = "") -> None:
    """The same table in the terminal: under each scenario the model, a constant answer and the baselines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    models = by_model(rows)
    own, measure = models.pop(""), headline(rows[0])
    single = {row["scenario"]: row[measure] for row in models.pop(UNIMODAL, ())}
    scores = {name: {row["scenario"]: row[measure] for row in found} for name, found in models.items()}
    beside = ["majority", *scores, *(["best unimodal on what remains"] if single else [])]
    table = Table(title=Text(title))  # as a Text: names and paths may hold what rich takes for markup
    for name in (*columns(own), *beside):
        table.add_column(Text(NAMES.get(name, name)), justify="left" if name == "scenario" else "right")
    for row in own:
        measured = [written(name, row[name], 3) for name in columns(own) if name in NAMES]
        compared = [row["majority"], *(found.get(row["scenario"]) for found in scores.values())]
        compared += [single.get(best_single(row["scenario"], single))] if single else []
        shown = ["" if value is None else written(measure, value, 3) for value in compared]
        table.add_row(Text(row["scenario"]), *measured, str(row["n"]), *shown)
    Console().print(table)


# ---------------------------------------------------------------------------------------------------------- pictures
def plot_report(reports: Mapping[str, Sequence[Row]], lines: Mapping[str, float] | None = None) -> Any:
    """A figure of the task's first measure by scenario (bars) and by missing rate (curve), one colour a report.

    Rows may hold `std`, drawn as error bars, and `majority`, drawn as a line as the other `lines` are: what a constant
    answer reaches.
    """
    from matplotlib.figure import Figure

    first = next(iter(reports.values()))
    measure = headline(first[0])
    fixed = [row["scenario"] for row in first if not _is_rate(row)]
    width = 4 + (len(fixed) * (0.4 + 0.5 * len(reports))) * 1.5
    figure = Figure(figsize=(min(max(width, 8), 24), 5), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    for i, (title, rows) in enumerate(reports.items()):
        _draw_bars(bars, [row for row in rows if not _is_rate(row)], measure, title, i, len(reports))
        _draw_curve(curve, rows, measure, title, with_values=len(reports) == 1)
    full = next((row for row in first if row["scenario"] == "full"), {})
    levels = {"majority": full["majority"]} if full.get("majority") is not None else {}
    for (name, level), style in zip((levels | dict(lines or {})).items(), ("--", ":", "-.", (0, (1, 3))), strict=False):
        for axes in (bars, curve):
            axes.axhline(level, color="0.35", linestyle=style, linewidth=1.2, label=f"{name} {level:.2f}")
    middle = 0.4 * (len(reports) - 1) / len(reports)
    bars.set_xticks([place + middle for place in range(len(fixed))], fixed, rotation=20, ha="right")
    lowest = min([0.0, *(row[measure] for rows in reports.values() for row in rows if row[measure] == row[measure])])
    bars.set(ylabel=NAMES[measure], ylim=(max(lowest, -1) * 1.1, 1.1), title="by scenario")
    curve.set(xlabel="missing rate", title="by missing rate")
    handles, labels = bars.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _is_rate(row: Row) -> bool:
    return row["scenario"].startswith("rate ")


def _draw_bars(axes: Any, rows: Sequence[Row], measure: str, title: str, number: int, reports: int) -> None:
    width = 0.8 / reports
    values = [row[measure] for row in rows]
    places = [place + number * width for place in range(len(rows))]
    deviations = [row.get("std", 0.0) for row in rows]
    bars = axes.bar(places, values, width, yerr=deviations if any(deviations) else None, capsize=3, label=title or None)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=8, padding=2)


def _draw_curve(axes: Any, rows: Sequence[Row], measure: str, title: str, with_values: bool) -> None:
    points = {_rate(row): row for row in rows if _is_rate(row) or row["scenario"] == "full"}
    rates = sorted(points)
    values = [points[rate][measure] for rate in rates]
    deviations = [points[rate].get("std", 0.0) for rate in rates]
    axes.errorbar(rates, values, deviations, marker="o", capsize=3, label=title or None)
    for rate, value in zip(rates, values, strict=True) if with_values else ():
        axes.annotate(f"{value:.2f}", (rate, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)


def _rate(row: Row) -> float:
    return float(row["scenario"].removeprefix("rate ")) if _is_rate(row) else 0.0


def plot_curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Any:
    """A figure of the training loss by epoch, and of the measure on the validation split where that was watched.

    Args:
        histories: `{name: one log of Trainer for each seed}`; a colour a name, a line a seed.
    """
    from matplotlib.figure import Figure

    logs = [log for seeds in histories.values() for history in seeds for log in history]
    measure = next((name for log in logs for name in NAMES if f"eval_{name}" in log), None)
    drawn = {"loss": "training loss"} | ({f"eval_{measure}": f"validation {NAMES[measure]}"} if measure else {})
    figure = Figure(figsize=(7 * len(drawn), 5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        for number, (name, seeds) in enumerate(histories.items()):
            for first, history in zip([name, *[""] * len(seeds)], seeds, strict=False):
                points = [(log["epoch"], log[key]) for log in history if key in log]
                axes.plot(*zip(*points, strict=True), color=f"C{number}", alpha=0.7, label=first or None)
        axes.set(xlabel="epoch", ylabel=title)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(frameon=False)
    return figure


def plot_confusion(predicted: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> Any:
    """A figure of how often each class (a row) is taken for each other, as shares of the row; `[n]` classes each."""
    from matplotlib.figure import Figure
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = multiclass_confusion_matrix(predicted, labels, len(names))
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    size = min(4 + 0.35 * len(names), 18)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    axes.set(xlabel="predicted", ylabel="true", title="everything present")
    if len(names) <= MOST_NAMES:
        shown = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 2] + ".." for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=60, ha="right", parse_math=False)
        axes.set_yticks(range(len(names)), shown, parse_math=False)
        for true, taken_for in counts.nonzero().tolist():
            colour = "white" if shares[true, taken_for] > 0.5 else "black"
            count = str(int(counts[true, taken_for]))
            axes.text(taken_for, true, count, ha="center", va="center", fontsize=7, color=colour)
    return figure
