"""All methods and the baselines on one data set over several seeds: one table, paired differences, two pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from .data_checks import check_data
from .methods import METHODS, LateFusion
from .methods.config import check_choice
from .metrics import headline
from .options import CompareOptions, TrainOptions, load_sources, settled
from .paired import TALLIES
from .processes import processes
from .reports import UNIMODAL, Row, plot_curves, plot_report
from .runs import RUN_FILE, check_directory, claim_directory, write_whole
from .training import BASELINES, STATE, build_model, run_once
from .verdicts import Cell, Verdicts, markdown

Due = dict[tuple[str, int], TrainOptions]  # by method or baseline, and seed


def compare(options: CompareOptions) -> dict[str, dict[str, Cell]]:
    """Train everything and write `comparison.csv`, `.png` and `.md`, and `curves.png`, into the output directory.

    Each method and seed has a folder of its own with a whole run in it; those that are finished are not run again, and
    those of other options are refused.

    Returns:
        `{method: {scenario: (mean, standard deviation) over seeds}}` of the accuracy (macro F1 of several labels a
        sample, R2 of a regression), baselines included. NaN where no sample of any seed counts.
    """
    if processes().num_processes > 1:
        raise ValueError("compare trains one model after another in one process: start it without a launcher")
    ours = [name for name, method in METHODS.items() if not method.baseline]
    methods, seeds = options.methods or ours, options.seeds or [0, 1, 2]
    for name in methods:
        check_choice("methods", name, list(METHODS))
    baselines = [name for name in BASELINES if options.baselines and _folder_name(name) not in methods]
    due = {(name, seed): _options(options, name, seed) for seed in seeds for name in (*methods, *baselines)}
    _check(due)
    runs: dict[str, list[list[Row]]] = {}
    models: dict[str, list[Path]] = {}
    for (name, _), one in tqdm(due.items(), desc="comparing", unit="run"):
        runs.setdefault(name, []).append(_run(one, name))
        for model, place in _models(Path(one.output_dir), name).items():
            models.setdefault(model, []).append(place)
    models = {name: places for name, places in models.items() if len(places) == len(seeds)}
    if UNIMODAL in runs:  # without those that in one of the seeds had too little to learn from
        runs[UNIMODAL] = [[row for row in rows if row["scenario"] in models] for rows in runs[UNIMODAL]]
    table, folder = {name: _cells(reports) for name, reports in runs.items()}, Path(options.output_dir)
    _write(table, folder, runs)
    text = markdown(Verdicts(table, _tallies(models), headline(runs[methods[0]][0][0])))
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    print(text)
    curves = plot_curves({name: [_log(one) for one in folders] for name, folders in models.items()})
    curves.savefig(folder / "curves.png", dpi=120)
    return table


def _options(options: CompareOptions, name: str, seed: int) -> TrainOptions:
    """Those of the run of one method or baseline, which has a folder of its own."""
    plain = {item.name: getattr(options, item.name) for item in fields(TrainOptions)}
    folder = Path(options.output_dir) / f"{_folder_name(name)}-seed{seed}"
    own = {"seed": seed, "output_dir": str(folder), "baselines": False, "resume": True}
    return TrainOptions(**plain | own | ({} if name in BASELINES else {"method": name}))


def _folder_name(name: str) -> str:
    return name.replace(" ", "_")


def _check(due: Due) -> None:
    """Refuse before the first training what one of the runs would refuse: its folder, its split, its method."""
    for one in due.values():
        check_directory(one)
    left = {key: one for key, one in due.items() if not _finished(Path(one.output_dir))}
    built: set[type] = set()
    for seed in dict.fromkeys(seed for _, seed in left):
        of_seed = {name: one for (name, drawn), one in left.items() if drawn == seed}
        splits, sources = load_sources(next(iter(of_seed.values())))
        for name, one in of_seed.items():
            check_data(one, splits, sources)
            method = METHODS.get(name, LateFusion)
            if method not in built:
                build_model(method, settled(one, splits), splits, sources)
                built.add(method)


def _run(one: TrainOptions, name: str) -> list[Row]:
    """The rows of one method or baseline, from its folder where it is finished."""
    folder = Path(one.output_dir)
    if rows := _finished(folder):
        return rows
    splits, sources = load_sources(one)
    if name in BASELINES:
        claim_directory(one)
        rows = BASELINES[name](one, splits, sources)
    else:
        rows = run_once(one, splits, sources)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "rows.csv", table.getvalue())  # half of it would pass for a run that is finished
    return rows


def _finished(folder: Path) -> list[Row] | None:
    files = (folder / RUN_FILE, folder / "rows.csv")
    if not all(file.exists() for file in files) or not any(folder.rglob(TALLIES)):
        return None
    with open(folder / "rows.csv", encoding="utf-8") as file:
        return [
            {"scenario": row.pop("scenario")} | {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]


def _models(folder: Path, name: str) -> dict[str, Path]:
    """The folder of each model that a run trained: of the unimodal ones by `image only`, of others by their method."""
    if name == UNIMODAL:
        return {path.name.replace("_only", " only"): path for path in sorted(folder.glob("*_only"))}
    return {name: folder / "late_fusion" if name in BASELINES else folder}


def _log(folder: Path) -> list[dict[str, float]]:
    """What Trainer logged of a model."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))["log_history"]


def _cells(reports: Sequence[Sequence[Row]]) -> dict[str, Cell]:
    scores: dict[str, list[float]] = {}
    for rows in reports:
        for row in rows:
            scores.setdefault(row["scenario"], []).append(row[headline(row)])
    return {name: _cell([score for score in s if not math.isnan(score)]) for name, s in scores.items()}


def _cell(scores: Sequence[float]) -> Cell:
    """Of the seeds in whose test split some samples count; one alone has no spread."""
    if not scores:
        return math.nan, math.nan
    return statistics.fmean(scores), statistics.stdev(scores) if len(scores) > 1 else math.nan


def _tallies(models: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, list[np.ndarray]]]:
    """What every sample of a test split adds, by model and scenario, from the folders of each model's seeds."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, folders in models.items():
        for folder in folders:
            for scenario, tally in load_file(folder / TALLIES).items():
                found.setdefault(name, {}).setdefault(scenario, []).append(tally)
    return found


def _write(table: Mapping[str, Mapping[str, Cell]], folder: Path, runs: Mapping[str, Sequence[Sequence[Row]]]) -> None:
    first = next(iter(runs.values()))
    measure, seeds = headline(first[0][0]), len(first)
    with open(folder / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "scenario", f"mean_{measure}", f"std_{measure}", "seeds"))
        for name, cells in table.items():
            for scenario, (mean, std) in cells.items():
                writer.writerow((name, scenario, f"{mean:.4f}", "" if math.isnan(std) else f"{std:.4f}", seeds))
    drawn = {
        name: [{"scenario": s, measure: m} | ({} if math.isnan(d) else {"std": d}) for s, (m, d) in cells.items()]
        for name, cells in table.items()
        if name != UNIMODAL
    }
    lines = {"majority": statistics.fmean(rows[0]["majority"] for rows in first)}
    lines |= {name: mean for name, (mean, _) in table.get(UNIMODAL, {}).items()}
    plot_report(drawn, lines).savefig(folder / "comparison.png", dpi=120)
