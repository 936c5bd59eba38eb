"""The scenario matrix: one pass over the encoders, every pattern of missing modalities substituted afterwards."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional import accuracy, f1_score
from tqdm.auto import tqdm

from .data import MissingPattern, MultimodalCollator
from .data.collator import LABELS
from .methods.base import MultimodalModel, to_device

RATES = (0.3, 0.5, 0.7, 0.9)
COLUMNS = ("scenario", "accuracy", "macro_f1", "n")
Row = dict[str, Any]


def default_scenarios(modalities: Sequence[str]) -> list[str]:
    """`full`, each modality missing alone (where there are two or more), and four missing rates.

    >>> default_scenarios(["image", "text"])[:4]
    ['full', 'image missing', 'text missing', 'rate 0.3']
    """
    if len(modalities) == 1:
        return ["full"]
    return ["full", *(f"{name} missing" for name in modalities), *(f"rate {rate}" for rate in RATES)]


def scenario_mask(scenario: str, natural: torch.Tensor, modalities: Sequence[str], seed: int = 0) -> torch.Tensor:
    """Presence under a scenario: bool `[n, M]`, never more than `natural` `[n, M]`.

    `"rate 0.7"` draws `MissingPattern(0.7, "both", split="test")`; where that would leave a sample nothing, the sample
    keeps what it has. `"image missing"` may leave a sample nothing: such samples do not count.

    Raises:
        ValueError: a scenario that is none of `full`, `<modality> missing`, `rate <number>`.
    """
    return _leave(scenario, natural, scenario_table(scenario, len(natural), modalities, seed))


def scenario_table(scenario: str, n: int, modalities: Sequence[str], seed: int = 0) -> torch.Tensor:
    """What a scenario leaves of n complete samples: bool `[n, M]`."""
    kept = torch.ones(n, len(modalities), dtype=torch.bool)
    if scenario == "full":
        return kept
    if scenario.endswith(" missing") and (name := scenario.removesuffix(" missing")) in modalities:
        kept[:, list(modalities).index(name)] = False
        return kept
    if scenario.startswith("rate "):
        pattern = MissingPattern(rate=float(scenario.removeprefix("rate ")), kind="both", seed=seed, split="test")
        return pattern.table(n, modalities)
    known = ", ".join(default_scenarios(modalities))
    raise ValueError(f"unknown scenario {scenario!r}: use one of {known} or another rate")


def _leave(scenario: str, natural: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    kept = natural & table
    return torch.where(kept.any(dim=1, keepdim=True), kept, natural) if scenario.startswith("rate ") else kept


def evaluate(
    model: MultimodalModel,
    dataset: Any,
    scenarios: Iterable[str] | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Row]:
    """Accuracy and macro F1 of a classifier under every scenario; each encoder runs once a sample.

    Args:
        dataset: samples with a column for each modality (None where it is missing) and `label`. Class names, where
            both have them (a `ClassLabel` here, `id2label` of the model), decide which class a label means.
        scenarios: names as in `scenario_mask`; None: `default_scenarios`.
        output_dir: where to write `report.csv` and `report.png`.

    Returns:
        One row a scenario: `{"scenario", "accuracy", "macro_f1", "n"}`, accuracy in 0..1, n the samples that count.

    Raises:
        ValueError: an unknown scenario, a regression model, which has no accuracy, or labels that are absent, out of
            range, or of a class that the model does not have.
    """
    modalities = model.config.modalities
    scenarios = list(default_scenarios(modalities) if scenarios is None else scenarios)
    for scenario in scenarios:  # before any work: a typing error should not cost a pass over the encoders
        scenario_table(scenario, 1, modalities)
    if len(dataset) == 0:
        raise ValueError("evaluate needs samples: this data set is empty")
    logits, natural, labels = scenario_logits(model, dataset, scenarios, batch_size, seed)
    if model.problem_type(labels) == "regression":
        raise ValueError("evaluate reports accuracy, which a regression model does not have: use Trainer.evaluate")
    rows = []
    for scenario in scenarios:
        counted = _counted(model, scenario_mask(scenario, natural, modalities, seed), labels)
        rows.append({"scenario": scenario, **_scores(logits[scenario][counted], labels[counted])})
    if output_dir is not None:
        write_report(rows, output_dir)
    return rows


@torch.no_grad()
def scenario_logits(
    model: MultimodalModel, dataset: Any, scenarios: Sequence[str], batch_size: int, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """`({scenario: logits [n, C]}, natural presence [n, M], labels [n])`; rows with nothing present hold zeros."""
    modalities, collate, was_training = model.config.modalities, MultimodalCollator(model.processors), model.training
    natural, labels, logits = [], [], {name: [] for name in scenarios}
    tables = {name: scenario_table(name, len(dataset), modalities, seed) for name in scenarios}
    classes = class_order(dataset, model)
    model.eval()
    try:
        for start in tqdm(range(0, len(dataset), batch_size), desc="evaluating", unit="batch"):
            rows = slice(start, min(start + batch_size, len(dataset)))
            batch = collate([dataset[i] for i in range(rows.start, rows.stop)])
            present, target = batch.pop("modality_mask"), batch.pop("labels", None)
            if target is None:
                raise ValueError("evaluate needs a label in every sample: this data set has none")
            if classes is not None:  # what is no class is left for the check to name
                target = torch.where(target < 0, target, classes[target.clamp(min=0)])
            model.check_labels(target, len(present))
            encoded = model.encode(to_device(batch, model.device), present)
            for name in scenarios:
                mask = _leave(name, present, tables[name][rows])
                logits[name].append(model.fuse(encoded, mask)[0].float().cpu())
            natural.append(present)
            labels.append(target)
    finally:
        model.train(was_training)
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(natural), torch.cat(labels)


def class_order(dataset: Any, model: MultimodalModel) -> torch.Tensor | None:
    """`[classes of the data set]`: the model's number for each of them; None where one side has no names."""
    features, known = getattr(dataset, "features", None) or {}, model.config.id2label
    names = next((features[name].names for name in LABELS if hasattr(features.get(name), "names")), None)
    if names is None or known == {i: f"LABEL_{i}" for i in range(len(known))}:
        return None
    unknown = [name for name in names if name not in known.values()]
    if unknown:
        raise ValueError(f"this model has no class {unknown[0]!r}: its classes are {', '.join(known.values())}")
    numbers = {name: i for i, name in known.items()}
    return torch.tensor([numbers[name] for name in names])


def _counted(model: MultimodalModel, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    counted = mask.any(dim=1) | (model.all_absent == "prior")
    return counted & (labels != -100) if labels.dim() == 1 else counted


def _scores(logits: torch.Tensor, labels: torch.Tensor) -> Row:
    if not len(labels):
        return {"accuracy": float("nan"), "macro_f1": float("nan"), "n": 0}
    task = {"task": "multiclass", "num_classes": logits.shape[1]}
    predicted = logits.argmax(dim=1)
    if labels.is_floating_point():
        task = {"task": "multilabel", "num_labels": logits.shape[1]}
        predicted, labels = logits.sigmoid(), labels.int()
    return {
        "accuracy": accuracy(predicted, labels, average="micro", **task).item(),
        "macro_f1": f1_score(predicted, labels, average="macro", **task).item(),
        "n": len(labels),
    }


# ----------------------------------------------------------------------------------------------------------- reports
def write_report(rows: Sequence[Row], output_dir: str | Path) -> None:
    """`report.csv` and `report.png`."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "report.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, **{name: f"{row[name]:.4f}" for name in ("accuracy", "macro_f1")}})
    plot_report({"": rows}).savefig(folder / "report.png", dpi=120)


def print_report(rows: Sequence[Row], title: str = "") -> None:
    """The same table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "scenario" else "right")
    for row in rows:
        table.add_row(row["scenario"], f"{row['accuracy']:.3f}", f"{row['macro_f1']:.3f}", str(row["n"]))
    Console().print(table)


def plot_report(reports: Mapping[str, Sequence[Row]]) -> Any:
    """A figure of accuracy by scenario (bars) and by missing rate (curve), one colour a report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    bars, curve = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    height = 0.8 / len(reports)
    for i, (title, rows) in enumerate(reports.items()):
        fixed = [row for row in rows if not row["scenario"].startswith("rate ")]
        rates = [row for row in rows if row["scenario"].startswith("rate ") and "[" not in row["scenario"]]
        places = [place + i * height for place in range(len(fixed))]
        bars.bar(
            places, [row["accuracy"] for row in fixed], height, yerr=[row.get("std", 0) for row in fixed], label=title
        )
        bars.set_xticks(range(len(fixed)), [row["scenario"] for row in fixed], rotation=30, ha="right")
        full = [(0.0, row["accuracy"]) for row in rows if row["scenario"] == "full"]
        points = full + [(float(row["scenario"].split()[1]), row["accuracy"]) for row in rates]
        curve.plot(*zip(*points, strict=True), marker="o", label=title)
    bars.set(ylabel="accuracy", ylim=(0, 1), title="by scenario")
    curve.set(xlabel="missing rate", title="by missing rate")
    if len(reports) > 1:
        bars.legend(loc="lower right")
    return figure
