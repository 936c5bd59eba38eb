"""Which modality of which sample can be read: decided once, before holes are drawn or anything is trained."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .collator import MultimodalCollator, cell_name
from .inputs import KINDS, DecodeError, is_absent, read_cell

logger = logging.getLogger(__name__)

CHUNK = 256  # samples in memory at a time
NAMED = 5  # rows in a message; the others are counted

Modalities = Sequence[str] | MultimodalCollator


def readable(dataset: Any, modalities: Modalities, decode: bool = True, source: str = "the data") -> Tensor:
    """bool [n, M]: which cells of `dataset` (anything with len and integer indices) hold something that can be read.

    A cell is decoded as the collator decodes it: by its processor's kind where `modalities` is a collator, and by the
    name (image, text, audio, video) where it is a sequence of names; of other names, and with `decode=False`, every
    cell counts that is not empty. What cannot be decoded is reported in one warning a modality, with `source` and rows.

    Raises:
        ValueError: a modality that is a column of no sample, or a cell that such a column should not hold.

    >>> readable([{"image": b"no picture", "text": "a"}, {"image": None, "text": " "}], ("image", "text"))
    tensor([[False,  True],
            [False, False]])
    """
    kinds = kinds_of(modalities, decode)
    dataset = undecoded(dataset)
    columns: set[str] = set()
    present = torch.zeros(len(dataset), len(kinds), dtype=torch.bool)
    failures: dict[str, list[tuple[int, str]]] = {name: [] for name in kinds}
    starts = range(0, len(dataset), CHUNK)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(starts, desc=f"reading {source}", unit="chunk", disable=not decode or len(starts) < 2):
            samples = [dataset[i] for i in range(start, min(start + CHUNK, len(dataset)))]
            for row, sample in enumerate(samples, start):
                if not isinstance(sample, Mapping):
                    names = ", ".join(f'"{name}": ..' for name in kinds)
                    raise TypeError(f"{source}, row {row + 1} is {sample!r:.40}: write it as {{{names}}}")
            columns.update(*samples)
            for column, (name, kind) in enumerate(kinds.items()):
                cells = [sample.get(name) for sample in samples]
                for row, problem in enumerate(pool.map(problem_of, itertools.repeat(kind), cells), start):
                    present[row, column] = problem is None
                    if isinstance(problem, DecodeError):
                        failures[name].append((row, f"{cell_name(cells[row - start])}: {problem}"))
                    elif isinstance(problem, Exception):
                        raise ValueError(f"{source}, row {row + 1}, column {name}: {problem}") from problem
    unknown = [name for name in kinds if name not in columns]
    if unknown and len(dataset):
        raise ValueError(
            f"no sample has a column {unknown[0]!r}; there are {', '.join(map(str, dataset[0]))}: correct the name, or "
            "leave the modality out"
        )
    _report(failures, len(dataset), source)
    return present


def _report(failures: Mapping[str, Sequence[tuple[int, str]]], count: int, source: str) -> None:
    for name, found in failures.items():
        if found:
            rows = rows_named([row for row, _ in found])
            counts = f"{len(found)} of {count} {name} cells cannot be decoded and count as absent"
            logger.warning("%s: %s (rows %s); %s", source, counts, rows, found[0][1])


def without_unreadable(dataset: Any, modalities: Sequence[str], keep_empty: bool, source: str) -> Any:
    """A `datasets.Dataset` with None for what cannot be decoded, less the rows with nothing left; a stream as it is.

    Raises:
        ValueError: no row has anything that can be read.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        return dataset
    dataset = undecoded(dataset)
    names = [name for name in modalities if name in dataset.column_names]
    present = readable(dataset, names, source=source)
    given = readable(dataset, names, decode=False)
    if not present.any():
        raise ValueError(f"{source} has no row with anything that can be read, so there is nothing to learn from")
    if not torch.equal(present, given):
        broken = [[name for name, kept in zip(names, row, strict=True) if not kept] for row in present.tolist()]
        dataset = dataset.map(lambda _, i: dict.fromkeys(broken[i]), with_indices=True, features=dataset.features)
    kept = present.any(dim=1)
    if keep_empty or kept.all():
        return dataset
    gone = (~kept).nonzero().flatten().tolist()
    logger.warning("%s: %d rows have nothing that can be read (rows %s)", source, len(gone), rows_named(gone))
    return dataset.select(kept.nonzero().flatten().tolist())


def warn_of_losses(collate: MultimodalCollator, count: int) -> None:
    """Warn of what a collator could not decode of the `count` samples it has seen, and of what it cut."""
    for modality, broken in collate.undecodable.items():
        logger.warning("%d of %d %s cells cannot be decoded and count as absent", broken, count, modality)
    for modality, cut in collate.cut.items():
        if cut.count:
            rate = getattr(collate.processors[modality], "sampling_rate", None)
            logger.warning("%s", cut.sentence(modality, count, rate))


def warn_of_cuts(processors: Mapping[str, Any], dataset: Any) -> None:
    """Warn before training of the texts and recordings of a data set that are cut in every epoch."""
    collate = MultimodalCollator(processors)
    names = [name for name, kind in collate.kinds.items() if kind in ("text", "audio")]
    for samples in batches_of(samples_of(dataset), CHUNK):
        for name in names:
            collate.measure(name, [value for s in samples if (value := collate.read(name, s.get(name))) is not None])
    collate.undecodable.clear()  # reported when the data was read
    warn_of_losses(collate, len(dataset))


def rows_named(rows: Sequence[int]) -> str:
    """Row numbers for a message, the first row is 1.

    >>> rows_named([0, 4, 5, 6, 7, 8, 9])
    '1, 5, 6, 7, 8 and 2 more'
    """
    named = ", ".join(str(row + 1) for row in rows[:NAMED])
    return f"{named} and {len(rows) - NAMED} more" if len(rows) > NAMED else named


@contextlib.contextmanager
def in_rows(first: int, count: int) -> Iterator[None]:
    """What is refused in a batch of `count` rows from `first` on (0 is the first) is refused with their numbers.

    >>> with in_rows(32, 8):
    ...     raise ValueError("sample 3 of the batch has nothing")
    Traceback (most recent call last):
    ValueError: rows 33 to 40: sample 3 of the batch has nothing
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"rows {first + 1} to {first + count}: {error}") from error


def undecoded(dataset: Any) -> Any:
    """A data set of Hugging Face with its files left to the collator: decoding there, a broken one ends an epoch.

    A pandas DataFrame becomes a list of its rows, a Series one of its cells; anything else stays what it is.

    Raises:
        TypeError: a dictionary of splits, a path, or what holds no samples.
    """
    if isinstance(dataset, (Mapping, str, Path)) or not (
        hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    ):
        given = f"a {type(dataset).__name__}"
        raise TypeError(f"{given} is no data set: pass one of its splits, or load_table(path)['test']")
    if hasattr(dataset, "iloc"):
        return dataset.to_dict("records") if hasattr(dataset, "columns") else dataset.tolist()
    for name, feature in (getattr(dataset, "features", None) or {}).items():
        if type(feature).__name__ in ("Image", "Audio", "Video") and feature.decode:
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def samples_of(dataset: Any) -> Iterator[dict[str, Any]]:
    """The samples of a data set, a stream, a pandas DataFrame or any iterable of dictionaries, one by one."""
    dataset = undecoded(dataset)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[i] for i in range(len(dataset)))
    return iter(dataset)


def samples_for(samples: Any, modalities: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """`samples_of` what a model is asked about; a string is a text, or a cell of a model's only modality.

    Raises:
        TypeError: something else than samples.
        ValueError: one with a modality under its name in other letters.
    """
    if isinstance(samples, (Mapping, str)):
        raise TypeError("samples must be a list of dictionaries: write predict([sample]) for a single one")
    only = modalities[0] if len(modalities) == 1 else "text"
    for number, sample in enumerate(samples_of(samples), start=1):
        if isinstance(sample, str) and only in modalities:
            sample = {only: sample}
        if not isinstance(sample, Mapping):
            known = ", ".join(modalities)
            raise TypeError(f"sample {number} is a {type(sample).__name__}: write a dictionary with any of {known}")
        refuse_misspelt(sample, modalities, number)
        yield sample


def refuse_misspelt(sample: Mapping[str, Any], modalities: Iterable[str], number: int) -> None:
    """ValueError where a sample has a modality under its name in other letters, under which nobody reads it."""
    known = {name.casefold(): name for name in modalities}
    for name in sample:
        meant = known.get(str(name).strip().casefold())
        if meant is not None and meant not in sample:
            raise ValueError(f"sample {number} has {name!r}, which is not read: call it {meant!r}")


def batches_of(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` samples, the last of what is left; ValueError where that is less than 1."""
    if size < 1:
        raise ValueError(f"a batch needs at least 1 sample, not {size}: choose another batch_size")
    samples = iter(samples)
    return iter(lambda: list(itertools.islice(samples, size)), [])


def kinds_of(modalities: Modalities, decode: bool = True) -> dict[str, str | None]:
    """{modality: kind}; None where cells are not decoded."""
    if isinstance(modalities, MultimodalCollator):
        return {name: kind if decode else None for name, kind in modalities.kinds.items()}
    return {name: name if decode and name in KINDS else None for name in modalities}


def problem_of(kind: str | None, cell: Any) -> Exception | bool | None:
    """None where the cell can be read, True where it is empty, or what was raised."""
    if is_absent(cell):
        return True
    try:
        if kind is not None:
            read_cell(kind, cell)
    except (TypeError, ValueError) as error:
        return error
    return None
