"""A data set, or a stream of samples, with a missing table laid over it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .missing import MissingPattern, realised
from .presence import Modalities, kinds_of, problem_of, readable, rows_named, samples_of, undecoded

logger = logging.getLogger(__name__)


class MissingDataset(Dataset):
    """The samples of `dataset`, with None for each modality that the table takes away. Made by `with_missing`.

    `table` is what the samples have now, bool [n, M]; with `simulate` it is drawn anew by `set_epoch`, which Trainer
    and accelerate call. `rows` [n] are the rows of `dataset` that the samples come from.
    """

    def __init__(
        self,
        dataset: Any,
        table: Tensor | MissingPattern,
        modalities: Modalities,
        simulate: bool = False,
        all_absent: str = "error",
        decode: bool = True,
    ) -> None:
        self.dataset = undecoded(dataset)
        self.modalities = tuple(kinds_of(modalities))
        self.pattern = table if isinstance(table, MissingPattern) else None
        self.simulate = simulate
        if simulate and self.pattern is None:
            raise ValueError("simulate=True draws a table for each epoch: pass a MissingPattern instead of a table")
        expected = (len(dataset), len(self.modalities))
        if isinstance(table, Tensor) and tuple(table.shape) != expected:
            raise ValueError(f"the missing table is {tuple(table.shape)}, the data and modalities are {expected}")
        present = readable(self.dataset, modalities, decode)
        kept = present.any(dim=1) if all_absent == "error" else torch.ones(len(present), dtype=torch.bool)
        self.rows = kept.nonzero().flatten()
        self._present = present[kept]
        if len(self.rows) < len(present):
            gone = (~kept).nonzero().flatten().tolist()
            logger.warning(
                "%d of %d samples have nothing that can be read and are left out (rows %s)",
                len(gone), len(present), rows_named(gone),
            )  # fmt: skip
        if isinstance(table, MissingPattern):
            self._draw(table, 0 if simulate else None)
        else:
            self.table = leave(self._present, table[kept])

    def _draw(self, pattern: MissingPattern, epoch: int | None) -> None:
        self.table = leave(self._present, pattern.table(len(self), self.modalities, epoch=epoch))

    def set_epoch(self, epoch: int) -> None:
        """Draw the table of `epoch` under the simulated protocol; a fixed table stays."""
        if self.simulate and self.pattern is not None:
            self._draw(self.pattern, epoch)

    def summary(self) -> str:
        """The realised counts, natural holes included, in a sentence."""
        pattern = self.pattern
        if pattern is None:
            return f"{realised(self.table, self.modalities)}."
        counts = realised(self.table, self.modalities, pattern.split)
        return f"{counts} (kind {pattern.kind}, seed {pattern.seed})."

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _emptied(self.dataset[int(self.rows[index])], self.modalities, self.table[index])


class MissingStream(IterableDataset):
    """`MissingDataset` of a stream: each sample is read and its holes are drawn when it comes by.

    The share of incomplete samples is near the rate, not exactly it. What is drawn depends on the seed, the split, the
    number of workers, the sample's place in the stream and, with `simulate`, the epoch.
    """

    def __init__(
        self, dataset: Any, pattern: MissingPattern, modalities: Modalities, simulate: bool, all_absent: str
    ) -> None:
        self.dataset = undecoded(dataset)
        self.features = getattr(dataset, "features", None)
        self.kinds = kinds_of(modalities)
        self.modalities = tuple(self.kinds)
        self.pattern = pattern
        self.simulate = simulate
        self.keep_empty = all_absent == "prior"
        self.epoch = 0

    def summary(self) -> str:
        """What is known of a stream before it comes by."""
        pattern = self.pattern
        return f"About {pattern.rate:.0%} of the samples are incomplete (kind {pattern.kind}, seed {pattern.seed})."

    def set_epoch(self, epoch: int) -> None:
        """The order of the stream in `epoch`, and under the simulated protocol its holes."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        tables = self.pattern.stream(
            self.modalities, self.epoch if self.simulate else None, 0 if worker is None else worker.id
        )
        for number, (sample, table) in enumerate(zip(samples_of(self.dataset), tables, strict=False), start=1):
            present = torch.tensor([problem_of(kind, sample.get(name)) is None for name, kind in self.kinds.items()])
            if present.any() or self.keep_empty:
                yield _emptied(sample, self.modalities, leave(present[None], table[None])[0])
            else:
                logger.warning("sample %d of the stream has nothing that can be read and is left out", number)


def with_missing(
    dataset: Any,
    table: Tensor | MissingPattern,
    modalities: Modalities,
    simulate: bool = False,
    all_absent: str = "error",
    decode: bool = True,
) -> MissingDataset | MissingStream:
    """`dataset` with the modalities that `table` drops set to None.

    Args:
        dataset: anything with len and integer indices, or a stream (`datasets.IterableDataset`, any iterable).
        table: bool [n, M], True = present, or a MissingPattern, whose table is drawn here. Natural holes and what
            cannot be decoded stay holes; where they and the table together would leave nothing, the sample keeps what
            it has.
        modalities: their names, or the collator, which says of what kind a modality of another name is.
        simulate: the other protocol, full data with simulated holes: the pattern is drawn anew at every epoch. Results
            under the two protocols do not compare. Workers that persist over epochs do not see the new table.
        all_absent: "error" leaves out samples with nothing that can be read, with one warning that names them; "prior"
            keeps them, for models built with `all_absent="prior"`.
        decode: whether to read every file now; without, only empty cells are holes.

    Raises:
        ValueError: a modality that is a column of no sample, or a table of another size.

    >>> rows = [{"image": None, "text": "a", "label": 0}, {"image": None, "text": "b", "label": 1}]
    >>> holed = with_missing(rows, MissingPattern(rate=1.0, kind="text"), ("image", "text"))
    >>> holed[0]["text"], holed[1]["text"]
    ('a', 'b')
    """
    if hasattr(dataset, "__len__"):
        return MissingDataset(dataset, table, modalities, simulate, all_absent, decode)
    if not isinstance(table, MissingPattern):
        raise ValueError("a stream has no length that a table could have: pass a MissingPattern instead of a table")
    return MissingStream(dataset, table, modalities, simulate, all_absent)


def leave(present: Tensor, table: Tensor) -> Tensor:
    """What a table leaves of what is there, both bool [n, M]: all of it where nothing would remain.

    >>> leave(torch.tensor([[True, False], [True, True]]), torch.tensor([[False, True], [False, True]]))
    tensor([[ True, False],
            [False,  True]])
    """
    kept = present & table
    return torch.where(kept.any(dim=1, keepdim=True), kept, present)


def _emptied(sample: dict[str, Any], modalities: Sequence[str], kept: Tensor) -> dict[str, Any]:
    lost = [name for name, there in zip(modalities, kept.tolist(), strict=True) if not there]
    return {**sample, **dict.fromkeys(lost)}
