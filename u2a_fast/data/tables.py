"""A user's own data: a table with any of the columns image, text and audio, and a label."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import is_absent
from .splits import MODALITIES, SHARES, Row, file_cell, make_dataset, split_rows

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".jsonl", ".parquet")
COLUMNS = (*MODALITIES, "label", "group")


def load_table(path: str | Path, seed: int = 0) -> datasets.DatasetDict:
    """Train, validation and test out of a table, or a folder of tables.

    `path` is a .csv, .jsonl or .parquet file, or a folder that holds either one such file or files named train,
    validation and test. A single table is split by `seed` (65 / 10 / 25%, classes balanced, rows of one `group`
    together); named files are taken as they are.

    Columns: any of image, text and audio; `label`; optionally `group`. Others are ignored. Images and recordings are
    paths relative to their table, and are not decoded here. A blank or NaN cell, or a file that does not exist, means
    that the modality is absent. Labels that are strings or whole numbers become a ClassLabel (numbers in numeric
    order); other numbers, and lists of numbers, stay as they are. A table without a label column loads without labels.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a table cannot be used.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "train.csv").write_text("text,label\\na dog,animal\\n,food\\n")
    ...     load_table(folder)["train"][1]
    {'text': None, 'label': 1}
    """
    files = _find_tables(Path(path))
    splits = {name: _known_columns(_read_rows(file), file) for name, file in files.items()}
    class_names = _settle_labels([row for rows in splits.values() for row in rows if "label" in row])
    if list(splits) == ["all"]:
        splits = split_rows(splits["all"], seed)
    return make_dataset(splits, class_names)


def _find_tables(path: Path) -> dict[str, Path]:
    """{"all": file}, or {"train": file, ..} in the usual order."""
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is not a table: its name must end in {', '.join(SUFFIXES)}")
        return {"all": path}
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")
    tables = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    named = {name: [file for file in tables if file.stem == name] for name in SHARES}
    for name, files in named.items():
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} tables for {name}; keep one of them")
    found = {name: files[0] for name, files in named.items() if files}
    if found:
        return found
    if len(tables) != 1:
        raise FileNotFoundError(
            f"{path} holds {len(tables)} tables; it should hold one, or train, validation and test "
            f"({', '.join(SUFFIXES)})"
        )
    return {"all": tables[0]}


def _read_rows(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        return read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; such a table is safer as .jsonl") from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise ValueError(f"{path}, row {number} has more cells than the header; quote cells that hold commas")
    return rows


def _known_columns(rows: list[Row], path: Path) -> list[Row]:
    """Rows with the known columns only, every one of them in every row, absent cells as None."""
    given = {key for row in rows for key in row}
    columns = [column for column in COLUMNS if column in given]
    if not given.intersection(MODALITIES):
        raise ValueError(f"{path} has the columns {sorted(given)}; it needs at least one of {', '.join(MODALITIES)}")
    known = [{column: None if is_absent(row.get(column)) else row[column] for column in columns} for row in rows]
    for column in columns:
        if column in ("image", "audio"):
            _resolve_files(known, column, path)
        elif column == "label":
            _require_labels(known, path)
        else:
            for row in known:
                row[column] = None if row[column] is None else str(row[column])
    return known


def _require_labels(rows: list[Row], path: Path) -> None:
    for number, row in enumerate(rows, start=1):
        if row["label"] is None:
            raise ValueError(f"{path}, row {number} has no label; fill it in or leave the row out")


def _resolve_files(rows: list[Row], column: str, table: Path) -> None:
    """Turn paths into absolute ones; a file that does not exist is absent, all of them missing is a mistake."""
    named = [row for row in rows if isinstance(row[column], str)]
    missing = []
    for row in named:
        file = (table.parent / row[column]).absolute()
        row[column] = file_cell(file) if file.is_file() else None
        if row[column] is None:
            missing.append(file)
    if missing and len(missing) == len(named):
        raise FileNotFoundError(
            f"none of the {len(named)} files of the column {column} of {table} exists, {missing[0]} for one; "
            "paths are relative to the table"
        )
    if missing:
        counts = f"{len(missing)} of {len(named)} {column} files"
        logger.warning("%s do not exist and count as absent, %s for one", counts, missing[0])


def _settle_labels(rows: list[Row]) -> list[str] | None:
    """Make every label a class name and return the names in order, or make it a number (or list) and return None."""
    labels = {row["label"] if isinstance(row["label"], str | int | float) else None for row in rows}
    if None in labels or not labels:
        return None
    kind = next((kind for kind in (int, float) if all(_is_number(label, kind) for label in labels)), None)
    for row in rows:
        row["label"] = float(row["label"]) if kind is float else str(row["label"])
    if kind is float:
        unfit = [row["label"] for row in rows if not math.isfinite(row["label"])]
        if unfit:
            raise ValueError(f"{len(unfit)} of the numeric labels are {unfit[0]}; fill them in or leave the rows out")
        return None
    return sorted({row["label"] for row in rows}, key=kind)


def _is_number(label: str | int | float, kind: type) -> bool:
    if isinstance(label, float):
        return kind is float
    try:
        kind(label)
    except ValueError:
        return False
    return not isinstance(label, bool)
