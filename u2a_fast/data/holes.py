"""A data set with a missing table laid over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from .inputs import is_absent
from .missing import MissingPattern


class MissingDataset(Dataset):
    """The samples of `dataset`, with None for each modality that the table takes away. Made by `with_missing`.

    `table` is the current one, bool [n, M]; with `simulate` it is drawn anew by `set_epoch`, which Trainer and
    accelerate call.
    """

    def __init__(
        self, dataset: Any, table: Tensor | MissingPattern, modalities: Sequence[str], simulate: bool = False
    ) -> None:
        self.dataset = dataset
        self.modalities = tuple(modalities)
        self.pattern = table if isinstance(table, MissingPattern) else None
        self.simulate = simulate
        if simulate and self.pattern is None:
            raise ValueError("simulate=True draws a table for each epoch: pass a MissingPattern instead of a table")
        self.table = table if self.pattern is None else self.pattern.table(len(dataset), self.modalities)
        self._require_columns()
        expected = (len(dataset), len(self.modalities))
        if tuple(self.table.shape) != expected:
            raise ValueError(f"the missing table is {tuple(self.table.shape)}, the data and modalities are {expected}")
        if simulate:
            self.set_epoch(0)

    def _require_columns(self) -> None:
        """A misspelt modality would be taken from nobody. Of a good data set one sample is read, or a few."""
        size = len(self)
        for modality in self.modalities:
            if size and not any(modality in self.dataset[index] for index in range(size)):
                raise ValueError(
                    f"no sample has a column {modality!r}; there are {', '.join(map(str, self.dataset[0]))}: "
                    "correct the name, or leave the modality out"
                )

    def set_epoch(self, epoch: int) -> None:
        """Draw the table of `epoch` under the simulated protocol; a fixed table stays."""
        if self.simulate:
            self.table = self.pattern.table(len(self), self.modalities, epoch=epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.dataset[index])
        available = [modality for modality in self.modalities if not is_absent(sample.get(modality))]
        drawn = [modality for modality, kept in zip(self.modalities, self.table[index].tolist(), strict=True) if kept]
        kept = set(available) & set(drawn) or available
        for modality in self.modalities:
            if modality not in kept:
                sample[modality] = None
        return sample


def with_missing(
    dataset: Any, table: Tensor | MissingPattern, modalities: Sequence[str], simulate: bool = False
) -> MissingDataset:
    """`dataset` (anything with len and integer indices) with the modalities that `table` drops set to None.

    `table` is bool [n, M], True = present, or a MissingPattern, whose table is drawn here. Natural holes stay; where
    they and the table together would leave nothing, the sample keeps what it has.
    `simulate=True` is the other protocol, full data with simulated holes: the pattern is drawn anew at every epoch.
    Results under the two protocols do not compare. Workers that persist over epochs do not see the new table.

    Raises:
        ValueError: a modality that is a column of no sample, or a table of another size.

    >>> rows = [{"image": "a.png", "text": "a", "label": 0}, {"image": None, "text": "b", "label": 1}]
    >>> holed = with_missing(rows, MissingPattern(rate=1.0, kind="text"), ("image", "text"))
    >>> holed[0]["text"], holed[1]["text"]
    (None, 'b')
    """
    return MissingDataset(dataset, table, modalities, simulate)
