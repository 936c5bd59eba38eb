"""All methods and the baselines on one data set over several seeds: one table, one plot."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm.auto import tqdm

from .methods import METHODS
from .methods.config import check_choice
from .metrics import headline
from .options import TrainOptions, load_sources, option
from .reports import UNIMODAL, Row, best_single, plot_report
from .runs import RUN_FILE, check_directory, claim_directory
from .training import BASELINES, run_once

Cell = tuple[float, float]  # mean and standard deviation over seeds of what the task is ranked by


@dataclass(frozen=True)
class CompareOptions(TrainOptions):
    """The options of `train`, for every method and seed; `method` and `seed` are set by the comparison."""

    methods: list[str] | None = option(None, "which methods to train; None: all but the baselines")
    seeds: list[int] | None = option(None, "which seeds to train with; None: 0, 1, 2")


def compare(options: CompareOptions) -> dict[str, dict[str, Cell]]:
    """Train everything and write `comparison.csv`, `comparison.png` and `comparison.md` into the output directory.

    Each method and seed has a folder of its own with a whole run in it; those that are finished are not run again, and
    those of other options are refused.

    Returns:
        `{method: {scenario: (mean, standard deviation) over seeds}}` of the accuracy (macro F1 of several labels a
        sample, R2 of a regression), baselines included.
    """
    ours = [name for name, method in METHODS.items() if not method.baseline]
    methods, seeds = options.methods or ours, options.seeds or [0, 1, 2]
    for name in methods:
        check_choice("methods", name, list(METHODS))
    runs: dict[str, list[list[Row]]] = {}
    due = [(name, seed) for seed in seeds for name in (*methods, *(BASELINES if options.baselines else ()))]
    for name, seed in tqdm(due, desc="comparing", unit="run"):
        runs.setdefault(name, []).append(_run(options, name, seed))
    table = {name: _cells(reports) for name, reports in runs.items()}
    _write(table, Path(options.output_dir), runs)
    return table


def verdicts(table: Mapping[str, Mapping[str, Cell]]) -> list[tuple[str, str, str]]:
    """`(scenario, winner, methods that beat the unimodal model trained on what remains)`, by mean accuracy.

    With several modalities left, the best of their unimodal models is the one to beat.
    """
    methods = [name for name in table if name != UNIMODAL]
    single = {name: mean for name, (mean, _) in table.get(UNIMODAL, {}).items()}
    found = []
    for scenario in next(iter(table.values())):
        winner = max(methods, key=lambda name: table[name][scenario][0])
        best = best_single(scenario, single)
        beaten = [name for name in methods if best is not None and table[name][scenario][0] > best]
        found.append((scenario, winner, ", ".join(beaten) or "none"))
    return found


def _run(options: CompareOptions, name: str, seed: int) -> list[Row]:
    """The rows of one method or baseline, from its folder where it is finished."""
    folder = Path(options.output_dir) / f"{name.replace(' ', '_')}-seed{seed}"
    plain = {item.name: getattr(options, item.name) for item in fields(TrainOptions)}
    one = replace(TrainOptions(**plain), seed=seed, output_dir=str(folder), baselines=False, resume=True)
    one = one if name in BASELINES else replace(one, method=name)
    check_directory(one)
    if (folder / RUN_FILE).exists() and (rows := _finished(folder)):
        return rows
    splits, sources = load_sources(one)
    if name in BASELINES:
        claim_directory(one)
        rows = BASELINES[name](one, splits, sources)
    else:
        rows = run_once(one, splits, sources)
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _finished(folder: Path) -> list[Row] | None:
    if not (folder / "rows.csv").exists():
        return None
    with open(folder / "rows.csv", encoding="utf-8") as file:
        return [
            {"scenario": row.pop("scenario")} | {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]


def _cells(reports: Sequence[Sequence[Row]]) -> dict[str, Cell]:
    scores: dict[str, list[float]] = {}
    for rows in reports:
        for row in rows:
            scores.setdefault(row["scenario"], []).append(row[headline(row)])
    return {name: (statistics.fmean(s), statistics.stdev(s) if len(s) > 1 else 0.0) for name, s in scores.items()}


def _write(table: Mapping[str, Mapping[str, Cell]], folder: Path, runs: Mapping[str, Sequence[Sequence[Row]]]) -> None:
    first = next(iter(runs.values()))
    measure, seeds = headline(first[0][0]), len(first)
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "scenario", f"mean_{measure}", f"std_{measure}", "seeds"))
        for name, cells in table.items():
            writer.writerows((name, s, f"{m:.4f}", f"{d:.4f}", seeds) for s, (m, d) in cells.items())
    text = markdown(table)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    print(text)
    drawn = {
        name: [{"scenario": s, measure: m, "std": d} for s, (m, d) in cells.items()]
        for name, cells in table.items()
        if name != UNIMODAL
    }
    lines = {"majority": statistics.fmean(rows[0]["majority"] for rows in first)}
    lines |= {name: mean for name, (mean, _) in table.get(UNIMODAL, {}).items()}
    plot_report(drawn, lines).savefig(folder / "comparison.png", dpi=120)


def markdown(table: Mapping[str, Mapping[str, Cell]]) -> str:
    """The comparison as a Markdown table: a row a scenario, a column a method, then who wins."""
    methods = [name for name in table if name != UNIMODAL]
    lines = [
        "| scenario | " + " | ".join(methods) + " | best | beats the best unimodal model on what remains |",
        "|---" * (len(methods) + 3) + "|",
    ]
    for scenario, winner, beaten in verdicts(table):
        cells = (table[name][scenario] for name in methods)
        scores = " | ".join(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in cells)
        lines.append(f"| {scenario} | {scores} | {winner} | {beaten} |")
    single = [f"{name} {mean:.3f} ± {deviation:.3f}" for name, (mean, deviation) in table.get(UNIMODAL, {}).items()]
    closing = [f"Unimodal models trained on what remains: {', '.join(single)}."] if single else []
    return "\n".join([*lines, "", *closing, ""])
