"""The scenario matrix: one pass over the encoders, every pattern of missing modalities substituted afterwards."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .allocator import keep_freed_memory
from .data import MissingPattern, MultimodalCollator
from .data.classes import Classes
from .data.collator import LABELS
from .data.holes import leave
from .data.inputs import is_absent
from .data.labels import label_names
from .data.presence import batches_of, in_rows, rows_named, samples_of, warn_of_losses
from .methods.base import MultimodalModel, evaluating, to_device
from .metrics import NOT_FINITE, refuse_not_finite, score
from .paired import TALLIES, tally
from .processes import is_main
from .reports import Row, plot_confusion, write_report
from .tensor_files import check_folder

logger = logging.getLogger(__name__)

RATES = (0.3, 0.5, 0.7, 0.9)
RATE = re.compile(r"rate (?P<rate>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)")


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
    table = torch.stack([*itertools.islice(scenario_rows(scenario, len(natural), modalities, seed), len(natural))])
    return _left(scenario, natural, table)


def scenario_rows(scenario: str, n: int | None, modalities: Sequence[str], seed: int = 0) -> Iterator[torch.Tensor]:
    """What a scenario leaves of one complete sample after another: bool `[M]`; of a stream n is None.

    In a stream each sample is incomplete with the probability that the rate says.
    """
    kept = torch.ones(len(modalities), dtype=torch.bool)
    if scenario == "full":
        return itertools.repeat(kept)
    if scenario.endswith(" missing") and (name := scenario.removesuffix(" missing")) in modalities:
        kept[list(modalities).index(name)] = False
        return itertools.repeat(kept)
    if (rate := RATE.fullmatch(scenario)) is not None:
        pattern = MissingPattern(rate=float(rate["rate"]), kind="both", seed=seed, split="test")
        return pattern.stream(modalities) if n is None else iter(pattern.table(n, modalities))
    known = ", ".join(default_scenarios(modalities))
    raise ValueError(f"unknown scenario {scenario!r}: use one of {known} or another rate")


def _left(scenario: str, natural: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return leave(natural, table) if scenario.startswith("rate ") else natural & table


@keep_freed_memory()
def evaluate(
    model: MultimodalModel,
    dataset: Any,
    scenarios: Iterable[str] | None = None,
    output_dir: str | Path | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Row]:
    """The measures of the model's task under every scenario; each encoder runs once a sample.

    Args:
        dataset: samples with a column for each modality (None where it is missing) and `label`: a data set, a
            DataFrame, or a stream of them, whose rates are drawn sample by sample. Class names, where both have them (a
            `ClassLabel` or strings here, `id2label` of the model), decide which class a label means.
        scenarios: names as in `scenario_mask`; None: `default_scenarios`.
        output_dir: where to write `report.csv`, `report.png`, what `paired` compares models by and, of a classifier,
            `confusion.png`.

    Returns:
        One row a scenario: `{"scenario", .., "n", "majority"}`, n the samples that count. Of a classifier `accuracy`
        and `macro_f1` in 0..1, of two classes `auroc` too; of several labels a sample `micro_f1`, `macro_f1`, `map` and
        `accuracy`; of a regression `mae`, `rmse` and `r2`. `majority` is what a constant answer has of the first.

    Raises:
        ValueError: an unknown scenario or none, a file in place of the folder, or labels that are absent, out of range,
            or of a class that the model does not have.
    """
    modalities = model.config.modalities
    named = [scenarios] if isinstance(scenarios, str) else scenarios
    scenarios = list(dict.fromkeys(default_scenarios(modalities) if named is None else named))
    for scenario in scenarios:  # before any work: a typing error should not cost a pass over the encoders
        scenario_rows(scenario, 1, modalities)
    if not scenarios:
        raise ValueError("evaluate needs scenarios: name some, or leave them out for the default ones")
    if output_dir is not None:
        check_folder(output_dir, "a report")  # which is made once there is one
    logits, natural, labels = scenario_logits(model, dataset, scenarios, batch_size, seed)
    for name, values in logits.items():
        refuse_not_finite(f"the logits of {name!r}", values, NOT_FINITE)
    empty = (~natural.any(dim=1)).nonzero().flatten().tolist()
    if empty and model.all_absent == "error":
        told = "%d of %d rows have nothing that can be read and do not count (rows %s)"
        logger.warning(told, len(empty), len(natural), rows_named(empty))
    problem_type, rows, tallies = model.problem_type(labels), [], {}
    for scenario in scenarios:
        counted = _counted(model, scenario_mask(scenario, natural, modalities, seed), labels)
        tallies[scenario] = tally(problem_type, logits[scenario], labels, counted)
        scores = score(problem_type, logits[scenario][counted], labels[counted])
        majority = scores.pop("majority")
        rows.append({"scenario": scenario, **scores, "n": int(counted.sum()), "majority": majority})
    if output_dir is not None:
        write_report(rows, output_dir)
        save_file(tallies, Path(output_dir) / TALLIES)
        if problem_type == "single_label_classification" and "full" in scenarios:
            counted = _counted(model, natural, labels)
            names = [model.config.id2label[i] for i in range(model.config.num_labels)]
            figure = plot_confusion(logits["full"][counted].argmax(dim=1), labels[counted], names)
            figure.savefig(Path(output_dir) / "confusion.png", dpi=120)
    return rows


@torch.no_grad()
def scenario_logits(
    model: MultimodalModel, dataset: Any, scenarios: Sequence[str], batch_size: int, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """`({scenario: logits [n, C]}, natural presence [n, M], labels [n])`; rows with nothing present hold zeros."""
    modalities, collate = model.config.modalities, MultimodalCollator(model.processors)
    batches = batches_of(samples_of(dataset), batch_size)
    natural: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in scenarios}
    count = len(dataset) if hasattr(dataset, "__len__") else None
    tables = {name: scenario_rows(name, count, modalities, seed) for name in scenarios}
    classes, known = class_order(dataset, model), _classes(model)
    named = classes is not None
    total = None if count is None else math.ceil(count / batch_size)
    with evaluating(model):
        for samples in tqdm(batches, desc="evaluating", unit="batch", total=total, disable=not is_main()):
            with in_rows(sum(len(part) for part in labels), len(samples)):
                batch = collate([_numbered(sample, known) for sample in samples])
                present, target = batch.pop("modality_mask"), batch.pop("labels", None)
                if target is None:
                    raise ValueError("evaluate needs a label in every sample: this data set has none")
                target = _as_the_model_counts(target, classes, model.config.num_labels)
                model.check_labels(target, len(present))
            named = named or any(isinstance(sample.get(name), str) for sample in samples for name in LABELS)
            encoded = model.encode(to_device(batch, model.device), present)
            for name in scenarios:
                mask = _left(name, present, torch.stack([*itertools.islice(tables[name], len(samples))]))
                logits[name].append(model.fuse(encoded, mask)[0].float().cpu())
            natural.append(present)
            labels.append(target)
    if not labels:
        raise ValueError("evaluate needs samples: this data set is empty")
    warn_of_losses(collate, sum(map(len, labels)))
    if not named and model.problem_type(labels[0]) == "single_label_classification":
        _warn_of_positions(known)
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(natural), torch.cat(labels)


def class_order(dataset: Any, model: MultimodalModel) -> torch.Tensor | None:
    """`[classes of the data set]`: the model's number for each of them; None where one side has no names."""
    features, known = getattr(dataset, "features", None) or {}, _classes(model)
    names = next((label_names(features[name]) for name in LABELS if name in features), None)
    if names is not None and model.problem_type(None) == "regression":
        raise ValueError(
            f"these labels are classes ({', '.join(names[:3])}, ..), and the model answers with numbers: load the data "
            'with task="regression"'
        )
    return None if names is None or known is None else torch.tensor([known.number(name) for name in names])


def _classes(model: MultimodalModel) -> Classes | None:
    """None where nobody gave the model names."""
    known = model.config.id2label
    if known == {i: f"LABEL_{i}" for i in range(len(known))}:
        return None
    return Classes([known[i] for i in sorted(known)])


def _numbered(sample: Mapping[str, Any], known: Classes | None) -> Mapping[str, Any]:
    """A sample with the model's number of its class in place of a name, and with marks in place of several names."""
    column = next((name for name in LABELS if sample.get(name) is not None), None)
    if column is None or known is None:
        return sample
    label = sample[column]
    if isinstance(label, str) and not is_absent(label):
        return {**sample, column: known.number(label)}
    if isinstance(label, list | tuple) and all(isinstance(part, str) for part in label):
        marked = {known.number(part) for part in label}
        return {**sample, column: [float(i in marked) for i in range(len(known.names))]}
    return sample


def _warn_of_positions(known: Classes | None) -> None:
    """Of labels that are numbers without names, for a model whose names are other numbers."""
    names = known.names if known else ()
    if names and all(name.isdecimal() for name in names) and list(names) != [str(i) for i in range(len(names))]:
        logger.warning(
            "labels that are numbers are taken for places among the classes, 0 for %r: pass names as strings, %r, or a "
            "ClassLabel column, where they are names",
            *(names[0], names[0]),
        )


def _as_the_model_counts(target: torch.Tensor, classes: torch.Tensor | None, count: int) -> torch.Tensor:
    """Labels in the model's order of classes; what is no class is left for the check to name."""
    if classes is None:
        return target
    if target.dim() == 1:
        known = (target >= 0) & (target < len(classes))
        return torch.where(known, classes[target.clamp(0, len(classes) - 1)], target)
    return target.new_zeros(len(target), count).index_copy(1, classes, target)


def _counted(model: MultimodalModel, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    counted = mask.any(dim=1) | (model.all_absent == "prior")
    return counted & (labels != -100) if model.problem_type(labels) == "single_label_classification" else counted
