"""A user's own data: a table with any of the columns image, text, audio and video, and a label."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cells import READERS, is_bare
from .inputs import is_absent
from .labels import settle_labels
from .presence import readable, rows_named
from .spelling import tidy
from .splits import MODALITIES, Row, make_dataset, split_rows, warn_of_leaks
from .table_files import SPLITS, find_tables, read_rows

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# Our columns, and what else people call them; where ours is absent, the only other one is taken.
COLUMNS = {
    "image": ("img", "photo", "image_path", "img_path"),
    "text": ("title", "caption", "sentence"),
    "audio": ("recording", "speech", "audio_path"),
    "video": ("video_path", "clip_path"),
    "label": ("labels", "class", "category", "target"),
    "group": (),
    "split": (),
}
FILE_NAME = "file_name"  # of the hub's folders: an image, a recording or a video, by how it ends
ENDINGS = {
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"),
    "video": (".mp4", ".mov", ".avi", ".mkv", ".webm"),
}
SPLITS_TOO = ("set", "partition", "subset", "fold")  # what else people call `split`, and for other things too
NO_MODALITY = ("label", "group", "split")  # columns that are no modality


def load_table(
    path: str | Path,
    seed: int = 0,
    task: str | None = None,
    label_separator: str | None = None,
    columns: Mapping[str, str] | None = None,
    decode: bool = False,
    keep_empty: bool = False,
    usual: Mapping[str, str] | None = None,
    modalities: Collection[str] = MODALITIES,
) -> datasets.DatasetDict:
    """Train, validation and test out of a table, or a folder of tables.

    `path` is a .csv, .tsv, .jsonl or .parquet file, or a folder that holds either one such file or files named train,
    validation (val, dev) and test, whole or in shards. A single table is split by its `split` column where it has
    one, by `seed` otherwise (65 / 10 / 25%, classes balanced, rows of one `group` together). That of train may hold the
    validation split, told by that column.

    Columns, whatever their case: any of image, text, audio and video; `label`; optionally `group` and `split`. Others
    are ignored. Images, recordings and videos are paths relative to their table, bytes, {"path", "bytes"} records, or
    for recordings {"array", "sampling_rate"}. A blank or NaN cell, or a file that does not exist, means that the
    modality is absent. Labels: see `settle_labels`. A table without a label column loads without labels; in one with
    it, a row with nothing at all is left out.

    Args:
        task: classification, multi_label or regression; None: what the labels look like.
        label_separator: what stands between several labels in one cell.
        columns: {our name: the table's}, where the table calls them otherwise.
        decode: open every file now: what cannot be decoded becomes None, and a row with nothing left is left out
            unless `keep_empty`; both are reported with the table's row numbers.
        usual: more `columns`, for a table that has them.
        modalities: those that are read; nothing in the columns of others is looked at.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a table, row or cell that cannot be used.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "train.csv").write_text("text,label\\na dog,animal\\n,food\\n")
    ...     load_table(folder)["train"][1]
    {'text': None, 'label': 1}
    """
    splits = {}
    needed = (*modalities, *NO_MODALITY)
    for name, files in find_tables(Path(path)).items():
        tables = [_only_there(_read(file, columns or {}, usual or {}, needed), file, decode) for file in files]
        splits[name] = [row for table in tables for row in table if not _is_blank(row)]
    rows = [row for part in splits.values() for row in part]
    if not rows:
        raise ValueError(f"{path} has blank rows only: there is nothing to learn from")
    labelled = [row for row in rows if "label" in row]
    class_names = settle_labels(labelled, task, label_separator) if labelled else None
    if list(splits) == ["all"]:
        splits = _by_split_column(rows) if any("split" in row for row in rows) else split_rows(rows, seed)
    else:
        splits = _by_own_splits(splits)
    if decode and not keep_empty:
        splits = {name: _without_empty(part) for name, part in splits.items()}
    if decode:
        warn_of_leaks(splits, str(path))
    for row in rows:
        del row["place"]
        row.pop("split", None)
    return make_dataset(splits, class_names)


def read_samples(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    usual: Mapping[str, str] | None = None,
    modalities: Collection[str] = MODALITIES,
) -> list[Row]:
    """The rows of one table as samples to predict: `modalities` alone, files neither opened nor looked for.

    Raises:
        FileNotFoundError, ValueError: as `load_table`.
    """
    tables = find_tables(Path(path))
    if len(tables) > 1:
        raise ValueError(f"{path} holds {len(tables)} tables, {' and '.join(tables)}: name the one to answer")
    (files,) = tables.values()
    rows = [row for file in files for row in _read(file, columns or {}, usual or {}, modalities)]
    return [{name: row[name] for name in MODALITIES if name in row} for row in rows]


def read_lines(rows: Sequence[Row], source: str, modalities: Collection[str]) -> list[Row]:
    """The modalities of rows that lie in no file, read as those of a table in the working directory."""
    names = list(dict.fromkeys(short_name(name) for row in rows for name in row))
    chosen = _choose_columns(names, rows, {}, {}, Path(source), modalities)
    return [{name: row[name] for name in chosen} for row in _cells(rows, chosen, Path(source), Path())]


def _read(path: Path, columns: Mapping[str, str], usual: Mapping[str, str], needed: Collection[str]) -> list[Row]:
    """The rows of a table with those of our columns that are needed, every one in every row, absent cells as None."""
    named = [theirs for theirs in (*columns.values(), *usual.values()) if isinstance(theirs, str)]
    known = {short_name(name) for name in (*COLUMNS, *chain(*COLUMNS.values()), FILE_NAME, *SPLITS_TOO, *named)}
    names, rows = read_rows(path, lambda name: short_name(name) in known)
    chosen = _choose_columns(names, rows, columns, usual, path, needed)
    modalities = [name for name in MODALITIES if name in needed]
    if not set(chosen) & set(modalities):
        raise ValueError(
            f"{path} has the columns {sorted(names)}; it needs at least one of {', '.join(modalities)}: "
            f"""rename one, or pass --columns '{{"{modalities[0]}": ".."}}'"""
        )
    if "split" in needed and "split" not in chosen:
        _warn_of_unread_splits(names, rows, chosen.values(), path)
    return _cells(rows, chosen, path, path.absolute().parent)


def _cells(rows: Sequence[Row], chosen: Mapping[str, str], source: Path, folder: Path) -> list[Row]:
    made = []
    for number, given in enumerate(rows, start=1):
        given = _lower_case(given, set(chosen.values()), source, number)
        row: Row = {"place": f"{source}, row {number}"}
        for ours, theirs in chosen.items():
            cell = given.get(theirs)
            try:
                absent = is_absent(cell)
                row[ours] = None if absent else READERS[ours](cell, ours, folder) if ours in READERS else cell
            except ValueError as error:
                raise ValueError(f"{source}, row {number}, column {theirs}: {error}") from error
        made.append(row)
    return made


def _only_there(rows: list[Row], table: Path, decode: bool) -> list[Row]:
    """The same rows, in which files that do not exist, or with `decode` cannot be decoded, are absent."""
    modalities = [name for name in MODALITIES if name in rows[0]]
    for column in modalities:
        drop_missing_files(rows, column, table)
    if decode:
        _drop_undecodable(rows, modalities, table)
    return rows


def short_name(column: str) -> str:
    """A column's name by which another spelling of it is found: of any case, without blanks and what nobody sees."""
    return tidy(column).casefold()


def _is_blank(row: Row) -> bool:
    """Whether a row of a table with labels has not even one: spreadsheets write them below their last."""
    return "label" in row and all(cell is None for name, cell in row.items() if name != "place")


def _lower_case(row: Row, used: set[str], path: Path, number: int) -> Row:
    lowered: Row = {}
    for name, cell in row.items():
        short = short_name(name)
        if short in lowered and short in used:
            raise ValueError(f"{path}, row {number} has the column {short!r} in two spellings: keep one of them")
        lowered[short] = cell
    return lowered


def _choose_columns(
    names: Sequence[str],
    rows: Sequence[Row],
    asked: Mapping[str, str],
    usual: Mapping[str, str],
    path: Path,
    needed: Collection[str],
) -> dict[str, str]:
    """{our column: the table's, in lower case}, of those that are needed."""
    aliases = {**COLUMNS, (kind := _kind_of_files(rows)): (*COLUMNS[kind], FILE_NAME)}
    found = [short_name(name) for name in names]
    wanted = [short_name(theirs) for theirs in asked.values() if isinstance(theirs, str)]
    named = {ours: short_name(theirs) for ours, theirs in usual.items()}
    chosen = {ours: theirs for ours, theirs in named.items() if theirs in found and theirs not in wanted}
    for ours, theirs in asked.items():
        if ours not in COLUMNS or not isinstance(theirs, str) or short_name(theirs) not in found:
            known = f"{path} has {list(names)}; ours are {', '.join(COLUMNS)}"
            raise ValueError(f"columns says {ours!r}: {theirs!r}, but {known}")
        chosen[ours] = short_name(theirs)
    # What somebody gave a name is not guessed at again: a label that is read as text too tells itself. Any column may
    # say what belongs together besides: `group` takes none away.
    taken = [theirs for ours, theirs in chosen.items() if ours != "group"]
    double = next((name for name in taken if taken.count(name) > 1), None)
    if double is not None:
        both = " and ".join(ours for ours, theirs in chosen.items() if theirs == double)
        raise ValueError(f"columns says that {double!r} of {path} is {both}: name another column for one of them")
    for ours, others in aliases.items():
        free = [name for name in (ours, *others) if name in found and name not in taken]
        candidates = [ours] if ours in free else free
        if ours in chosen or ours not in needed or not candidates:
            continue
        if len(candidates) > 1:
            choice = f'--columns \'{{"{ours}": "{candidates[0]}"}}\''
            raise ValueError(f"{path} has {' and '.join(candidates)} for {ours}: choose one with {choice}")
        chosen[ours] = candidates[0]
        if candidates[0] != ours:
            logger.warning("%s: the column %s is read as %s", path, candidates[0], ours)
    chosen = {name: chosen[name] for name in COLUMNS if name in chosen and name in needed}
    twice = next((name for name in chosen.values() if found.count(name) > 1), None)
    if twice is not None and path.suffix.lower() != ".jsonl":  # whose columns are those of all rows together
        raise ValueError(f"{path} has {len(names)} columns, two of them called {twice!r}: rename or remove one")
    return chosen


def _kind_of_files(rows: Sequence[Row]) -> str:
    """What the files of a column `file_name` are: recordings or videos where all end so, else images."""
    cells = [cell for row in rows for name, cell in row.items() if short_name(name) == FILE_NAME]
    paths = [cell.strip().casefold() for cell in cells if isinstance(cell, str) and cell.strip()]
    return next((kind for kind, ends in ENDINGS.items() if paths and all(p.endswith(ends) for p in paths)), "image")


# ------------------------------------------------------------------------------------------------------------- rows
def drop_missing_files(rows: Sequence[Row], column: str, table: Path) -> None:
    """A file that does not exist is absent; all of them missing is a mistake, but where hardly any row names one."""
    named = [(number, row) for number, row in enumerate(rows) if is_bare(row.get(column))]
    missing = [(number, row) for number, row in named if not os.path.isfile(row[column]["path"])]
    if not missing:
        return
    first = missing[0][1][column]["path"]
    if len(missing) == len(named) and 10 * len(named) > len(rows):
        raise FileNotFoundError(
            f"none of the {len(named)} files of the column {column} of {table} exists, {first!r:.300} for one; "
            "paths are relative to the table"
        )
    counts = f"{len(missing)} of {len(named)} {column} files"
    where = rows_named([number for number, _ in missing])
    logger.warning("%s: %s do not exist and count as absent (rows %s), %r for one", table, counts, where, first)
    for _, row in missing:
        row[column] = None


def _drop_undecodable(rows: list[Row], modalities: Sequence[str], table: Path) -> None:
    present = readable(rows, modalities, source=str(table))
    for row, there in zip(rows, present.tolist(), strict=True):
        row.update({name: None for name, kept in zip(modalities, there, strict=True) if not kept})
    empty = (~present.any(dim=1)).nonzero().flatten().tolist()
    if len(empty) == len(rows):
        raise ValueError(f"{table} has no row with anything that can be read, so there is nothing to learn from")
    if empty:
        logger.warning(
            "%s: %d of %d rows have nothing that can be read (rows %s)", table, len(empty), len(rows), rows_named(empty)
        )


def _without_empty(rows: list[Row]) -> list[Row]:
    return [row for row in rows if any(row.get(name) is not None for name in MODALITIES)]


def _split_of(cell: Any) -> str | None:
    return SPLITS.get(cell.strip().casefold()) if isinstance(cell, str) else None


def _by_split_column(rows: list[Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {}
    for row in rows:
        name = _split_of(row.get("split"))
        if name is None:
            raise ValueError(f"{row['place']} has the split {row.get('split')!r}: write train, validation or test")
        splits.setdefault(name, []).append(row)
    return {name: splits[name] for name in dict.fromkeys(SPLITS.values()) if name in splits}


def _by_own_splits(splits: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows of the train table that say so are the validation split, where no table is.

    Raises:
        ValueError: a row says that it is of another split than the table that holds it.
    """
    splits = dict(splits)
    if "validation" not in splits:
        apart = [row for row in splits.get("train", []) if _split_of(row.get("split")) == "validation"]
        if apart:
            splits["train"] = [row for row in splits["train"] if _split_of(row.get("split")) != "validation"]
            splits["validation"] = apart
    for name, part in splits.items():
        for row in part:
            if _split_of(row.get("split")) not in (None, name):
                raise ValueError(
                    f"{row['place']} has the split {row['split']!r}, but its table is that of {name}: move the row, "
                    "correct its split, or pass the table itself, which is then split by that column"
                )
    return splits


def _warn_of_unread_splits(names: Sequence[str], rows: Sequence[Row], read: Collection[str], path: Path) -> None:
    """Say it where a column that nobody reads seems to tell rows to train on from rows to test."""
    for name in names:
        short = short_name(name)
        if short in SPLITS_TOO and short not in read and any(_split_of(row.get(name)) for row in rows):
            choice = f'--columns \'{{"split": "{short}"}}\''
            logger.warning("%s: the column %s is not read, and rows are split without it: pass %s", path, name, choice)
