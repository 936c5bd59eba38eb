"""What the labels of a table mean: classes, several classes a row, or numbers."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .classes import LONGEST_NUMBER, NUMBER, TRUTH, meaning
from .inputs import is_absent
from .spelling import tidy

logger = logging.getLogger(__name__)

TASKS = ("classification", "multi_label", "regression")
COMMA = re.compile(r"[+\-\N{MINUS SIGN}]?(\d+[.,]?\d*|[.,]\d+)", re.ASCII)
THOUSANDS = re.compile(r"[+\-\N{MINUS SIGN}]?[1-9]\d{0,2},\d{3}", re.ASCII)
GROUPED = re.compile(r"[1-9]\d{0,2}(,\d{3})+", re.ASCII)
IDS = re.compile(r"\d{1,9}(, ?\d{1,9})*", re.ASCII)  # of several labels
# A number as people write it: 1.5, 1,5, 1,200,000.5, 1.200.000,5, 1,20,000.5, $1.50, 12,5 %, (1.50), 1.5-.
MEASURED = re.compile(
    r"[(<>~+\-\N{MINUS SIGN}]?[$\u20ac\u00a3\u00a5\u20b9]? ?"
    r"(\d+([.,]\d*)?|[.,]\d+|\d{1,3}([, ']\d{3})+([.,]\d+)?|\d{1,3}(\.\d{3})+(,\d+)?|\d{1,2}(,\d\d)+,\d{3}(\.\d+)?)"
    r"([eE][+-]?\d{1,3})? ?[%$\u20ac\u00a3\u00a5\u20b9]?[)\-]?",
    re.ASCII,
)
FEW = 0.1  # of the labels, so many that are no numbers are no classes beside measured numbers
POINTS = re.compile(r"[+\-\N{MINUS SIGN}]?[1-9]\d{0,2}\.\d{3}", re.ASCII)  # thousands, where commas are decimal
BELOW = re.compile(r"[+\-\N{MINUS SIGN}]?\d{1,3}", re.ASCII)  # a thousand
JOINED = re.compile(r"['\"]\s+['\"]")  # NumPy's 'a' 'b', which Python reads as one
NAMES = re.compile(r"\[\s*['\"]")  # how a list of names begins
TUPLE = re.compile(r"[({]\s*['\"].*[)}]", re.DOTALL)  # or set
NOTHING = ("()", "set()")
LIST = re.compile(r"\[(\s*['\"].*)?\]", re.DOTALL)  # of names or of nothing
MARKS = re.compile(r"\[[01](\.0*)?(, ?[01](\.0*)?)+\]")  # other numbers between brackets may be an interval
BLANKS = ("na", "n/a", "n.a.", "none", "null", "?", "-", "--", ".")
FP32_STEP = 2.0**-24  # what rounding loses of a number, at most

Row = dict[str, Any]


def settle_labels(rows: Sequence[Row], task: str | None = None, separator: str | None = None) -> list[str] | None:
    """Make every `row["label"]` a class name, a vector or a number; the class names in order, None for numbers.

    Args:
        rows: "place" says where each comes from, for messages.
        task: None: lists of names, and names with a `separator`, are several classes a row; whole numbers and names
            are one; other numbers, with a decimal comma too, are a regression. Lists of numbers are vectors: of
            classes where all are 0 or 1.
        separator: what stands between the names of a cell.

    Spellings of one label are one class: blanks of any kind and length, what nobody sees, the two ways to write an
    accented letter in Unicode; and where all labels are numbers or truth values, 1 and 1.0, true and True and 1. Names
    that differ in their case alone are kept apart, with a warning. Lists may be written as Python or JSON writes them,
    and as Python writes tuples and sets.

    Raises:
        ValueError: a cell that does not fit the task, vectors of different length, or what may mean two things.

    >>> rows = [{"place": "a.csv, row 1", "label": " 1"}, {"place": "a.csv, row 2", "label": 1.0}]
    >>> settle_labels(rows), [row["label"] for row in rows]
    (['1'], ['1', '1'])
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    texts = [row["label"].strip() if isinstance(row["label"], str) else "" for row in rows]
    lists = any(NAMES.match(text) or _tuple(text) for text in texts) or all(MARKS.fullmatch(text) for text in texts)
    spelled = lists and not separator and task != "classification"
    for row, text in zip(rows, texts, strict=True):
        label = _written_list(text, row["place"]) if spelled and text else row["label"]
        row["label"] = _cell(label, row["place"], separator)
    several = [row for row in rows if isinstance(row["label"], list)]
    if any(not isinstance(part, str) for row in several for part in row["label"]):
        return _settle_vectors(rows, task)
    if several or task == "multi_label":
        if task not in (None, "multi_label"):
            raise ValueError(f"{several[0]['place']} has several labels, which a {task} cannot have: write one")
        return _settle_sets(rows)
    return _settle_single(rows, task)


def label_feature(class_names: Sequence[str] | None, vectors: bool) -> Any:
    """The feature of a label column of a data set: a ClassLabel, a number, or a vector that carries its names."""
    import datasets

    if not vectors:
        return datasets.ClassLabel(names=list(class_names)) if class_names else datasets.Value("float32")
    # `id` is the one free field of a feature, and survives selecting, joining and saving.
    return datasets.List(datasets.Value("float32", id=json.dumps(class_names) if class_names else None))


def label_names(feature: Any) -> list[str] | None:
    """The class names that a label column's feature carries, those of `label_feature` and Hugging Face's own."""
    if hasattr(feature, "names"):
        return feature.names
    marks = getattr(getattr(feature, "feature", None), "id", None)
    return json.loads(marks) if marks else None


def labels_of(part: Any) -> Any:
    """The labels of a data set's rows as plain numbers and lists, where a format of it would make tensors of them."""
    return part.with_format(None)["label"]


def task_of(feature: Any) -> str | None:
    """The task that a label column of this feature is for; None where there is no such column."""
    if feature is None:
        return None
    if hasattr(feature, "names"):
        return "classification"
    return "multi_label" if label_names(feature) else "regression"


def _cell(label: Any, place: str, separator: str | None) -> Any:
    """A name, a number or a list of either, tidied."""
    if isinstance(label, str) and separator:
        label = [part for part in label.split(separator) if tidy(part)]
    if isinstance(label, list | tuple) and not any(isinstance(part, list | tuple) for part in label):
        return [_cell(part, place, None) for part in label]
    label = tidy(label) if isinstance(label, str) else label
    if is_absent(label):
        raise ValueError(f"{place} has no label; fill it in or leave the row out")
    if isinstance(label, str):
        if not label.isprintable() and re.search("[\ud800-\udfff]", label):
            raise ValueError(f"{place} has the label {label!r}, half of a surrogate pair: write the whole character")
        return label
    if isinstance(label, bool | int | float | Decimal):
        return label
    raise ValueError(f"{place} has a {type(label).__name__} as its label: write a name, a number, or a list of them")


def _written_list(label: str, place: str) -> Any:
    """The list that a cell spells as Python or JSON writes it, which is what pandas makes of one; else the cell."""
    if label in NOTHING or (names := _tuple(label)):
        return [] if label in NOTHING else names
    if not LIST.fullmatch(label) and not MARKS.fullmatch(label):
        return label
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            parts = read(label)
            if isinstance(parts, list) and not JOINED.search(label):
                return parts
    raise ValueError(
        f"{place} has the label {label!r:.100}, which is no list as Python or JSON writes it: write names with commas "
        "between them, or say that it is one name with --task classification"
    )


def _tuple(text: str) -> list[str] | None:
    """The names of a tuple or a set as Python writes it; None where it is neither: a name may stand in brackets."""
    if TUPLE.fullmatch(text) and not JOINED.search(text):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            parts = ast.literal_eval(text)
            if isinstance(parts, tuple | set) and all(isinstance(part, str) for part in parts):
                return sorted(parts)
    return None


def _settle_vectors(rows: Sequence[Row], task: str | None) -> list[str] | None:
    """Vectors of numbers, all of one length; the numbers of the classes where they are marks."""
    first = rows[0]
    for row in rows:
        label = row["label"]
        if not isinstance(label, list) or any(isinstance(part, str) for part in label):
            raise ValueError(f"{row['place']} has no list of numbers as its label, but others have: write one kind")
        if len(label) != len(first["label"]):
            lengths = f"{len(first['label'])} numbers at {first['place']}, {len(label)} at {row['place']}"
            raise ValueError(
                f"label vectors differ in length ({lengths}): write vectors of one length, or lists of names"
            )
        row["label"] = [_finite(part, row["place"]) for part in label]
    marks = all(part in (0, 1) for row in rows for part in row["label"])
    if task == "classification" or (task == "multi_label" and not marks):
        raise ValueError(f"{first['place']} has a vector as its label, which is no {task}: write names")
    return [str(i) for i in range(len(first["label"]))] if marks and task != "regression" else None


def _settle_sets(rows: Sequence[Row]) -> list[str]:
    """Lists of names become vectors of 0 and 1 in the order of the names."""
    for row in rows:
        row["label"] = [str(part) for part in (row["label"] if isinstance(row["label"], list) else [row["label"]])]
    spelled = iter(_one_spelling([part for row in rows for part in row["label"]]))
    for row in rows:
        row["label"] = {next(spelled) for _ in row["label"]}
    names = sorted(set().union(*(row["label"] for row in rows)))
    if not names:
        raise ValueError(f"no row has any label, {rows[0]['place']} for one: fill them in or drop the column")
    _warn_of_case(names)
    for row in rows:
        row["label"] = [float(name in row["label"]) for name in names]
    return names


def _settle_single(rows: Sequence[Row], task: str | None) -> list[str] | None:
    texts = [str(row["label"]) for row in rows]
    if task is None:
        _refuse_ids(texts, rows)
    if task != "classification":
        texts = _with_points(texts, rows)
    numbers = _numbers(texts)
    if task is None and numbers is None:
        _refuse_mixed(texts, rows)
    if task == "regression" and numbers is None:
        for row, text in zip(rows, texts, strict=True):
            if _numbers([text]) is None:
                raise ValueError(
                    f"{row['place']} has the label {text!r}, which is no number: a regression needs numbers"
                )
    if numbers is not None and task != "classification" and (task == "regression" or _are_measured(texts, numbers)):
        unfit = [row for row, number in zip(rows, numbers, strict=True) if not number.is_finite()]
        if unfit:
            counted = f"{len(unfit)} of the numeric labels are {unfit[0]['label']}"
            raise ValueError(f"{counted} ({unfit[0]['place']}); fill them in or leave the rows out")
        for row, number in zip(rows, numbers, strict=True):
            row["label"] = _finite(number, row["place"])
        _refuse_too_close([row["label"] for row in rows], rows[0]["place"])
        return None
    if numbers is not None and any(number.is_nan() for number in numbers):
        numbers = None  # a class of that name: it has no place among numbers
    labels = [row["label"] for row in rows]
    if numbers is None:  # among names JSON's 1.0 is 1
        whole = [isinstance(label, float) and label.is_integer() for label in labels]
        texts = [str(int(label)) if one else text for label, one, text in zip(labels, whole, texts, strict=True)]
    texts = _one_spelling(texts)
    for row, text in zip(rows, texts, strict=True):
        row["label"] = text
    names = sorted(set(texts))
    if numbers is not None:
        values = dict(zip(texts, numbers, strict=True))
        names.sort(key=lambda name: values[name])
    _warn_of_case(names)
    return names


def _with_points(texts: list[str], rows: Sequence[Row]) -> list[str]:
    """Numbers as spreadsheets of most countries write them, 1,5 with a comma and a real minus; others as they are."""
    written = [
        text.replace("\N{MINUS SIGN}", "-").replace(",", ".") if COMMA.fullmatch(text) else text for text in texts
    ]
    if _numbers(written) is None:
        return texts
    commas = [(text, row["place"]) for text, row in zip(texts, rows, strict=True) if "," in text]
    if not commas:
        _refuse_points(rows)
    if commas and all(THOUSANDS.fullmatch(text) for text, _ in commas):
        raise _two_numbers(*commas[0], ",")
    if commas:
        for text, row in zip(texts, rows, strict=True):
            if POINTS.fullmatch(text):
                raise _two_numbers(text, row["place"], ".")
    return written


def _refuse_points(rows: Sequence[Row]) -> None:
    """ValueError where cells are whole below a thousand, 850, and above it 1.200, which may be thousands."""
    cells = [row["label"] for row in rows]
    if not all(isinstance(cell, str) for cell in cells):
        return
    pointed = {cell: row["place"] for cell, row in zip(cells, rows, strict=True) if "." in cell}
    others = {cell for cell in cells if cell not in pointed}
    if len(pointed) > 1 and others and all(map(POINTS.fullmatch, pointed)) and all(map(BELOW.fullmatch, others)):
        raise _two_numbers(*next(iter(pointed.items())), ".")


def _two_numbers(text: str, place: str, mark: str) -> ValueError:
    return ValueError(
        f"{place} has the label {text!r}, which may be {text.replace(mark, '.')} or {text.replace(mark, '')}: write "
        "numbers with a point, or say that they are names with --task classification"
    )


def _numbers(texts: Sequence[str]) -> list[Decimal] | None:
    """The labels as exact numbers, truth values among them as 0 and 1; None where one is a name, or all are truths."""
    plain = [TRUTH.get(text.casefold(), text) for text in texts]
    if not all(len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text) for text in plain):
        return None
    return None if all(text.casefold() in TRUTH for text in texts) else [Decimal(text) for text in plain]


def _are_measured(texts: Sequence[str], numbers: Sequence[Decimal]) -> bool:
    """Whether numbers are measurements, not classes: some are not whole, or all are written with a point."""
    whole = all(number.is_finite() and number == number.to_integral_value() for number in numbers)
    return not whole or not any(text.lstrip("+-").isdigit() for text in texts)


def _one_spelling(texts: list[str]) -> list[str]:
    """Numbers and truth values in the shortest way that each is written; beside names they may be codes, and stay."""
    if not all(text.casefold() in TRUTH for text in texts):
        numbers = _numbers(texts)
        if numbers is None or any(number.is_nan() for number in numbers):
            return texts
        texts = [TRUTH.get(text.casefold(), text) for text in texts]
    shortest: dict[str | Decimal, str] = {}
    for text in texts:
        what = meaning(text)
        shortest[what] = min(shortest.get(what, text), text, key=lambda spelling: (len(spelling), spelling))
    return [shortest[meaning(text)] for text in texts]


def _refuse_ids(texts: Sequence[str], rows: Sequence[Row]) -> None:
    """ValueError where "1,2" beside 3 may be two labels of a row: all such cells rise, and several numbers behind a
    comma stand in front of one too. Of ratings such as 1,5 and 5 it is the 5 alone.
    """
    several = [(text, row["place"]) for text, row in zip(texts, rows, strict=True) if "," in text]
    if not all(IDS.fullmatch(text) for text in texts) or all(GROUPED.fullmatch(text) for text, _ in several):
        return
    ids = [[int(part) for part in text.split(",")] for text in texts]
    rising = all(parts == sorted(set(parts)) for parts in ids) and not any(re.search(", ?0", text) for text in texts)
    again = {part for parts in ids for part in parts[1:]} & {parts[0] for parts in ids}
    if not rising or not (len(again) > 1 or any(not COMMA.fullmatch(text) for text in texts)):
        return
    text, place = several[0]
    raise ValueError(
        f"{place} has the label {text!r}, which may be one number or {len(text.split(','))} labels of the row: pass "
        '--label-separator "," for labels, or say that it is one with --task regression'
    )


def _refuse_mixed(texts: Sequence[str], rows: Sequence[Row]) -> None:
    """ValueError where labels are measured numbers but for blanks, few names, or another writing: each was a class."""
    written = [len(text) <= LONGEST_NUMBER and bool(MEASURED.fullmatch(text)) for text in texts]
    measured = any("." in text.rstrip(".0") or "," in text for text, like in zip(texts, written, strict=True) if like)
    others = [(text, row["place"]) for text, row in zip(texts, rows, strict=True) if _numbers([text]) is None]
    names = [text for text, _ in others if text.casefold() not in BLANKS and not MEASURED.fullmatch(text)]
    if len(names) > FEW * len(texts) or not measured or 2 * sum(written) <= len(texts):
        return
    text, place = next((other for other in others if not COMMA.fullmatch(other[0])), others[0])
    raise ValueError(
        f"{place} has the label {text!r:.100}, but most labels are numbers: write it as one, such as 1200.5, leave the "
        "row out, or say that all are names with --task classification"
    )


def _finite(number: Any, place: str) -> float:
    try:
        value = float(number)
    except OverflowError:
        value = float("inf")
    if not abs(value) < float("inf"):
        raise ValueError(f"{place} has the label {number}, which is no number to train on: fill it in or leave it out")
    return value


def _refuse_too_close(values: Sequence[float], place: str) -> None:
    """ValueError where fp32, in which models are trained, keeps less than two digits of what differs."""
    spread = max(values) - min(values)
    if max(map(abs, values)) * FP32_STEP > spread / 100 > 0:
        raise ValueError(
            f"the labels differ too little for their size, {values[0]:.15g} ({place}) for one, to be told apart in 32 "
            "bits: subtract their mean, or measure from another origin"
        )


def _warn_of_case(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            logger.warning("the labels %r and %r differ in case alone and are two classes", other, name)
