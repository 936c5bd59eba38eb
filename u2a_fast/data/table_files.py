"""Tables on disk: which files make up a data set, and the rows that each of them holds."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = ",;\t|"
ALONE = "\x1f"  # stands in no file: a header without a delimiter is that of one column, whose cells may hold any
SNIFFED = 50  # lines
FOR_EXCEL = re.compile(r'"?sep=(?P<delimiter>[,;\t|])"?\r?\n', re.IGNORECASE)  # a line that tells it the delimiter
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
OTHERS = (".json", ".ndjson", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".txt", *PACKED)  # tables, but not read
# What people call a split -> what we call it.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")  # as the Hugging Face hub names them

Row = dict[str, Any]


def find_tables(path: Path) -> dict[str, list[Path]]:
    """{"all": files}, or {"train": files, ..} in the usual order; several files are the shards of one table.

    Raises:
        FileNotFoundError: nothing is there, or not all of it.
        ValueError: a file of another kind, or two tables for one split.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is not a table: its name must end in {', '.join(SUFFIXES)}")
        return {"all": [path]}
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")
    tables, nested = _tables_in(path), _tables_in(path / "data")
    if tables and nested:
        here, below = (_named([files[0] for files in each.values()]) for each in (tables, nested))
        logger.warning("%s: not read, since there is %s beside it: data with %s", path, here, below)
    tables = tables or nested or _tables_of_splits(path)
    found: dict[str, list[Path]] = {}
    for name in dict.fromkeys(SPLITS.values()):
        stems = [stem for stem in tables if SPLITS.get(stem[0].casefold()) == name]
        if len(stems) > 1:
            raise ValueError(f"{path} holds {len(stems)} tables for {name}; keep one of them")
        if stems:
            found[name] = tables.pop(stems[0])
    unread = _named([file for file in (*_files_in(path), *_files_in(path / "data")) if _is_unread_split(file)])
    if found:
        if tables:
            extra = _named([files[0] for files in tables.values()])
            logger.warning("%s: not read, since no split has that name: %s", path, extra)
        if unread:
            logger.warning("%s: not read, since tables end in %s: %s", path, ", ".join(SUFFIXES), unread)
        return found
    if len(tables) != 1:
        beside = f", beside {unread}" if unread else ""
        raise FileNotFoundError(
            f"{path} holds {len(tables)} tables{beside}; it should hold one, or train, validation and test "
            f"({', '.join(SUFFIXES)})"
        )
    return {"all": next(iter(tables.values()))}


def _files_in(folder: Path) -> list[Path]:
    """In order, less what macOS leaves: `._x.csv`."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.is_file() and not file.name.startswith(".")]


def _tables_of_splits(path: Path) -> dict[tuple[str, str], list[Path]]:
    """Of folders named as splits, the only table of each: the hub's train/metadata.csv beside its pictures."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name.casefold() in SPLITS]
    each = {folder.name: list(_tables_in(folder).items()) for folder in folders}
    return {(name, tables[0][0][1]): tables[0][1] for name, tables in each.items() if len(tables) == 1}


def _is_unread_split(file: Path) -> bool:
    return file.suffix.lower() in OTHERS and file.name.partition(".")[0].casefold() in SPLITS


def _named(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def _tables_in(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """{(stem, suffix): files}, the shards of a table together and in order."""
    tables: dict[tuple[str, str], list[Path]] = {}
    counts: dict[tuple[str, str], int] = {}
    for file in _files_in(folder):
        if file.suffix.lower() in SUFFIXES:
            shard = SHARD.fullmatch(file.stem)
            key = (
                shard["stem"] if shard else file.stem,
                file.suffix.lower() + (f" x{shard['count']}" if shard else ""),
            )
            tables.setdefault(key, []).append(file)
            counts[key] = int(shard["count"]) if shard else 1
    for key, files in tables.items():
        if len(files) != counts[key]:
            raise FileNotFoundError(
                f"{folder} holds {len(files)} of the {counts[key]} files of {key[0]}: add the others"
            )
    return tables


def digest_of(path: Path) -> str | None:
    """SHA-256 of the tables that lie at `path`, by which one that has changed is told; None where there is none."""
    content = hashlib.sha256()
    try:
        for name, files in find_tables(path).items():
            content.update(f"{name} {len(files)}\0".encode())
            for file in files:
                with open(file, "rb") as opened:
                    content.update(hashlib.file_digest(opened, "sha256").digest())
    except (ValueError, OSError):
        return None
    return content.hexdigest()


def read_rows(path: Path, wanted: Callable[[str], bool] | None = None) -> tuple[list[str], list[Row]]:
    """The columns of a table and its rows, as they are written; class numbers of Hugging Face's tables as names.

    Args:
        wanted: whether a column of this name may be read; the cells of others may be left out.

    Raises:
        ValueError: the file cannot be read as what its name says, with the line where there is one, and the cure.
    """
    if path.suffix.lower() == ".parquet":
        columns, rows = _read_parquet(path, wanted)
    else:
        columns, rows = (_read_json_lines if path.suffix.lower() == ".jsonl" else _read_csv)(path)
    if not rows:
        raise ValueError(f"{path} has no rows{f' below its header {sorted(columns)}' if columns else ''}")
    return columns, rows


@contextlib.contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Pictures written into a cell are longer than csv expects of one."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@_cells_of_any_length()
def _read_csv(path: Path) -> tuple[list[str], list[Row]]:
    text = _text(path.read_bytes(), path)
    told = FOR_EXCEL.match(text)
    whole = text[told.end() if told else 0 :]
    body = whole.lstrip("\r\n")
    above = whole[: len(whole) - len(body)].count("\n") + bool(told)  # lines without a cell
    delimiter = told["delimiter"] if told else _delimiter_of(body)
    try:
        lines = _cells_by_line(body, delimiter)
    except csv.Error as error:
        start, fault = error.args
        place = f"{path}, line {start + above}"
        raise ValueError(f"{place}: {fault}; such a table is safer as .jsonl") from error
    header, *cells = lines or [[]]
    blank = next((i for i, row in enumerate(cells) if not row and any(cells[i:])), None)
    if blank is not None and len(header) == 1:
        logger.warning(
            '%s: blank lines, the one below row %d for one, are no rows: write "" for a row of nothing', path, blank
        )
    cells = [row for row in cells if row]
    short = [i for i, row in enumerate(cells) if len(row) < len(header)]
    if short:
        logger.warning("%s: %d rows are shorter than the header, row %d for one", path, len(short), short[0] + 1)
    if len(header) > 1 and header in cells:
        raise ValueError(f"{path}, row {cells.index(header) + 1} is the header again: remove it")
    for number, row in enumerate(cells, start=1):
        if any(cell.strip() for cell in row[len(header) :]):  # blank ones hold nothing
            raise ValueError(
                f"{path}, row {number} has more cells than the header; quote cells that hold {delimiter!r}"
            )
    return header, [dict.fromkeys(header) | dict(zip(header, row, strict=False)) for row in cells]


def _cells_by_line(text: str, delimiter: str) -> list[list[str]]:
    """Quotes enclose cells, behind a blank too; in a table of tabs they are letters where every line fits so.

    Within quotes another is written twice or, where the table is none otherwise, behind a backslash.

    Raises:
        csv.Error: the line at which a row starts, 1 for the first, and what is wrong with the row.
    """
    # strict, because otherwise a quote that is never closed swallows the rest of the file.
    quoted = partial(_parse, text, delimiter=delimiter, strict=True)
    lines = _unless_broken(quoted)
    if lines is None and '\\"' in text:
        escaped = _unless_broken(partial(quoted, escapechar="\\", doublequote=False))
        if escaped is not None and _is_even(escaped):
            return escaped
    if delimiter == "\t" and '"' in text:
        letters = _unless_broken(partial(_parse, text, delimiter=delimiter, quoting=csv.QUOTE_NONE))
        if letters is not None and (lines is None or len(lines) < len(letters)) and _is_even(letters):
            return letters
    elif f'{delimiter} "' in text:
        spaced = _unless_broken(partial(quoted, skipinitialspace=True))
        if spaced is not None and _is_even(spaced):
            return spaced
    return quoted() if lines is None else lines  # which says what is wrong


def _unless_broken(read: Callable[[], list[list[str]]]) -> list[list[str]] | None:
    try:
        return read()
    except csv.Error:
        return None


def _parse(text: str, **dialect: Any) -> list[list[str]]:
    reader, lines, start = csv.reader(io.StringIO(text, newline=""), **dialect), [], 1
    try:
        for cells in reader:
            lines.append(cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(start, error) from error
    return lines


def _is_even(lines: list[list[str]]) -> bool:
    """Whether all lines that hold cells hold as many."""
    return len({len(cells) for cells in lines if cells}) == 1


def _delimiter_of(text: str) -> str:
    """What parts the cells of a header that most of the first rows fit, and parts it into the most of them."""
    lines = list(itertools.islice(io.StringIO(text, newline=None), SNIFFED))
    fits = {}
    for delimiter in DELIMITERS:
        try:
            widths = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        except csv.Error:
            continue
        if widths and widths[0] > 1:
            fits[delimiter] = (sum(width == widths[0] for width in widths), widths[0])
    return max(fits, key=fits.__getitem__, default=ALONE)


def _read_json_lines(path: Path) -> tuple[list[str], list[Row]]:
    rows = parse_json_lines(path.read_bytes(), str(path))
    return list(dict.fromkeys(name for row in rows for name in row)), rows


def parse_json_lines(content: bytes, source: str) -> list[Row]:
    r"""One dictionary a line; blank lines count but hold nothing.

    Raises:
        ValueError: a line that is no JSON object, with `source` and its number.

    >>> parse_json_lines(b'{"text": "a"}\n\n{"text": "b"}\n', "standard input")
    [{'text': 'a'}, {'text': 'b'}]
    """
    rows = []
    # Only line feeds end a line: a string may hold U+2028 and others that `splitlines` would cut at.
    for number, line in enumerate(_text(content, source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            fault = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            why = "a JSON array of rows" if line.lstrip().startswith("[") else f"not JSON ({fault})"
            raise ValueError(f"{source}, line {number} is {why}: write one object a line") from error
        if not isinstance(row, dict):
            kind = "a JSON array" if isinstance(row, list) else json.dumps(row)[:20]
            cure = 'each line of the input must be one object such as {"text": "a"}'
            raise ValueError(f"{source}, line {number} is {kind}: {cure}")
        rows.append(row)
    return rows


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return row


def _read_parquet(path: Path, wanted: Callable[[str], bool] | None) -> tuple[list[str], list[Row]]:
    import datasets
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)  # `read_table` refuses two columns of one name, even where nobody reads them
        names = file.schema_arrow.names
        # Other columns may be wide, or hold what Python has no value for.
        table = file.read([name for name in names if wanted is None or wanted(name)] or None)
        rows = table.to_pylist()
        # Only a table of `datasets` names classes; columns of others it may not know.
        named = b"huggingface" in (table.schema.metadata or {})
        features = datasets.Features.from_arrow_schema(table.schema) if named else {}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
    for name, feature in features.items():
        one = getattr(feature, "feature", feature)  # of a list of classes, as of each alone
        if isinstance(one, datasets.ClassLabel) and one.names:
            for number, row in enumerate(rows, start=1):
                try:
                    row[name] = _class_names(row[name], one.names)
                except IndexError:
                    told = f"class {row[name]}, but its table names {len(one.names)} of them, from 0 on: correct it"
                    raise ValueError(f"{path}, row {number}, column {name} has {told}") from None
    return names, rows


def _class_names(cell: Any, names: Sequence[str]) -> Any:
    """The names of class numbers, None for no class."""
    if isinstance(cell, list):
        return [_class_names(part, names) for part in cell]
    return None if cell is None or cell < 0 else names[cell]


def _text(content: bytes, source: str | Path) -> str:
    """The content as text, which must be UTF-8, with or without a byte order mark."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:100]:
        raise ValueError(f"{source} is UTF-16 or no text at all: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        raise ValueError(
            f"{source}, line {line}: byte 0x{byte:02x} is not UTF-8, but perhaps Windows-1252: save the file as UTF-8"
        ) from error
