"""What a model says of samples, in words: classes with their probabilities, or numbers."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .data import MultimodalCollator, readable
from .data.cells import is_bare
from .data.presence import rows_named, samples_for
from .data.splits import MODALITIES
from .data.table_files import parse_json_lines
from .data.tables import COLUMNS, NO_MODALITY, read_lines, read_samples, short_name
from .methods.base import MultimodalModel
from .metrics import NOT_FINITE, refuse_not_finite

logger = logging.getLogger(__name__)

LIKELY = 0.5  # above it, one of several labels is given
DIGITS = 4

STDIN = "standard input"

Answer = dict[str, Any]


def samples_from(
    source: str,
    columns: Mapping[str, str] | None = None,
    usual: Mapping[str, str] | None = None,
    modalities: Collection[str] = MODALITIES,
) -> list[dict[str, Any]]:
    """Samples out of a table (.csv, .tsv, .jsonl, .parquet), or as JSON lines from the standard input (`-`).

    Paths of files are relative to the table, those of the standard input to the working directory. `columns` is
    {our column: theirs}, and `usual` more of them, for samples that have them. Nothing in the columns of modalities
    other than `modalities` is looked at.
    """
    if source != "-":
        return read_samples(source, columns, usual, modalities)
    return _renamed(parse_json_lines(sys.stdin.buffer.read(), STDIN), columns or {}, usual or {}, modalities)


def _renamed(
    rows: Sequence[dict[str, Any]],
    columns: Mapping[str, str],
    usual: Mapping[str, str],
    modalities: Collection[str],
) -> list[dict[str, Any]]:
    """Rows of the standard input, our modalities as a table's are read, files by their paths, the rest as it is."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    short, known = [short_name(name) for name in found], dict.fromkeys((*modalities, *COLUMNS))
    for ours, theirs in columns.items():
        if ours not in known:
            raise ValueError(f"columns says {ours!r}: {theirs!r}, but ours are {', '.join(known)}: correct the name")
        if rows and short_name(theirs) not in short:
            raise ValueError(
                f"columns says {ours!r}: {theirs!r}, but the standard input has {', '.join(sorted(found)) or 'none'}: "
                "correct the name"
            )
    taken = [short_name(theirs) for ours, theirs in columns.items() if ours not in NO_MODALITY]
    if (double := next((name for name in taken if taken.count(name) > 1), None)) is not None:
        both = " and ".join(ours for ours, theirs in columns.items() if short_name(theirs) == double)
        raise ValueError(f"columns says that {double!r} is {both}: name another column for one of them")
    columns = {ours: theirs for ours, theirs in usual.items() if short_name(theirs) in short} | dict(columns)
    ours_of = {short_name(theirs): ours for ours, theirs in columns.items() if ours not in NO_MODALITY}
    renamed = []
    for row in rows:
        asked = {ours_of[key]: cell for name, cell in row.items() if (key := short_name(name)) in ours_of}
        renamed.append({name: row[name] for name in row if short_name(name) not in ours_of} | asked)
    read = [
        {name: cell["path"] if is_bare(cell) else cell for name, cell in cells.items()}
        for cells in read_lines(renamed, STDIN, modalities)
    ]
    return [row | cells for row, cells in zip(renamed, read, strict=True)]


def predict_answers(
    model: MultimodalModel, samples: Iterable[Mapping[str, Any] | str], batch_size: int = 32, top_k: int = 3
) -> list[Answer]:
    """What the model says of each sample, in their order; an empty answer where nothing can be read.

    See `model.predict` for what samples may be, and `answers` for what an answer holds.
    """
    refuse_top_k(top_k)
    modalities = model.config.modalities
    given = [*samples_for(samples, modalities)]
    if not given:
        return []
    found = {name: None for sample in given for name in sample}
    if found and not found.keys() & set(modalities):
        raise ValueError(
            f"no sample has a column for {' or '.join(modalities)}; there are {', '.join(map(str, found))}: "
            "rename one, or pass --columns"
        )
    whole = [dict.fromkeys(modalities) | {name: sample.get(name) for name in modalities} for sample in given]
    kept = torch.ones(len(whole), dtype=torch.bool)
    if model.all_absent == "error":
        kept = readable(whole, MultimodalCollator(model.processors), source="the input").any(dim=1)
    rows = kept.nonzero().flatten().tolist()
    if len(rows) < len(whole):
        empty = (~kept).nonzero().flatten().tolist()
        logger.warning(
            "%d of %d samples have nothing that can be read (rows %s)", len(empty), len(whole), rows_named(empty)
        )
    said = dict(zip(rows, answers(model, model.predict([whole[i] for i in rows], batch_size), top_k), strict=True))
    return [said.get(i, {}) for i in range(len(whole))]


def refuse_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")


def answers(model: MultimodalModel, logits: torch.Tensor, top_k: int = 3) -> Iterator[Answer]:
    """Logits `[n, C]` in words, by the model's problem type.

    One class a sample: `label`, `probability`, and under `top` the `top_k` likeliest. Several: `labels`, those above
    0.5, and the `probabilities` of all. A regression: `value`, or `values` of several numbers.
    """
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    problem_type = model.problem_type(None)
    refuse_not_finite("the logits", logits, NOT_FINITE)
    for row in logits.double().cpu():
        if problem_type == "regression":
            yield {"value": row.item()} if len(names) == 1 else {"values": row.tolist()}
        elif problem_type == "multi_label_classification":
            chances = dict(zip(names, row.sigmoid().tolist(), strict=True))
            rounded = {name: round(p, DIGITS) for name, p in chances.items()}
            yield {"labels": [name for name, p in chances.items() if p > LIKELY], "probabilities": rounded}
        else:
            values, order = row.softmax(dim=0).topk(min(top_k, len(names)))
            top = [
                {"label": names[i], "probability": round(p, DIGITS)}
                for i, p in zip(order.tolist(), values.tolist(), strict=True)
            ]
            yield {**top[0], "top": top}


def check_output(output: str, source: str = "-") -> None:
    """Make the folder that answers go to.

    Raises:
        ValueError: they could not be written there, or would replace the samples.
    """
    if output == "-":
        return
    path = Path(output)
    if path.is_file() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"--output {output} is the input, which the answers would replace: choose another place")
    if path.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {path.parent} is no folder and cannot be made one") from error
    if not os.access(path if _stands(path) else path.parent, os.W_OK):
        raise ValueError(f"--output {output} may not be written: choose another place")


def write_answers(said: Sequence[Answer], output: str) -> None:
    """As a table where `output` ends in .csv, else as JSON lines (`-`: the standard output); whole or not at all."""
    if output == "-":
        sys.stdout.write(_json_lines(said))
        return
    path = Path(output)
    text = _table(said) if path.suffix.lower() == ".csv" else _json_lines(said)
    if _stands(path):
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _stands(path: Path) -> bool:
    """Whether it is a device or a pipe, which is written to and not replaced."""
    return path.exists() and not path.is_file()


def _json_lines(said: Sequence[Answer]) -> str:
    return "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in said)


def _table(said: Sequence[Answer]) -> str:
    flat = [_flat(answer) for answer in said]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(answer: Answer) -> dict[str, Any]:
    """An answer as cells: `label`, `probability`, `label_2`, ..; `labels` and a column for each label; numbers."""
    if "top" in answer:
        cells: dict[str, Any] = {}
        for place, one in enumerate(answer["top"], start=1):
            cells |= {name if place == 1 else f"{name}_{place}": value for name, value in one.items()}
        return cells
    if "labels" in answer:
        chances = {f"{name} " if name == "labels" else name: p for name, p in answer["probabilities"].items()}
        return {"labels": "|".join(answer["labels"]), **chances}
    if "values" in answer:
        return {f"value_{place}": value for place, value in enumerate(answer["values"], start=1)}
    return answer
