"""Which modality is missing in which sample: seeded tables under the protocol that the literature shares.

A rate of 0.7 means that 70% of the *samples* are incomplete. Tables are drawn once per split and stay fixed over the
epochs; every sample keeps at least one modality.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import numbers
import operator
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STREAM = 1000  # draws made at a time
UPSTREAM_LOST = {"text": 1, "image": 2}  # and 0 for a complete sample


@dataclass(frozen=True)
class MissingPattern:
    """How modalities go missing: a rate, a kind, and the seed that makes it repeatable.

    `rate` is the share of incomplete samples, in 0..1. `kind` says what they lose:

    - "both": one modality each. Of two modalities, `both_ratio` of the incomplete samples (rounded down) lose the first
      and the remainder the second; of more, all are lost equally often;
    - the name of a modality: that one;
    - "any": any set of modalities but all of them, every set equally often.

    The samples incomplete at one rate are among those incomplete at any higher rate, and lose the same there. Each
    split has a table of its own: the name of the split goes into the draw.

    >>> MissingPattern(rate=0.5, kind="text").table(4, ("image", "text")).sum(dim=0)
    tensor([4, 2])
    """

    rate: float = 0.7
    kind: str = "both"
    both_ratio: float = 0.5
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        for name in ("rate", "both_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value!r}")
            # By way of its digits: np.float32(0.7) means 0.7, as `_exact` has it, and not 0.699999988.
            object.__setattr__(self, name, float(str(value) if isinstance(value, np.floating) else value))
        object.__setattr__(self, "seed", _whole("seed", self.seed))

    def table(self, n: int, modalities: Sequence[str], epoch: int | None = None) -> Tensor:
        """The table: bool [n, M], True = present, for n samples and M modalities in the order given.

        floor(rate * n) samples are incomplete, in exact arithmetic: 63 of 90 at rate 0.7, not 62. `epoch` draws
        another table for each epoch, which is another protocol (see `with_missing`).

        Raises:
            ValueError: fewer than two modalities, or a kind that does not fit them.

        >>> table = MissingPattern(rate=0.7).table(90, ("image", "text"))
        >>> int((~table).any(dim=1).sum()), (~table).sum(dim=0).tolist()
        (63, [31, 32])
        """
        modalities = tuple(modalities)
        n = _whole("n", n)
        incomplete = math.floor(_exact(self.rate) * n)
        present = torch.ones(n, len(modalities), dtype=torch.bool)
        present[self._order(n, epoch)[:incomplete]] = torch.from_numpy(~self._losses(incomplete, modalities))
        return present

    def stream(self, modalities: Sequence[str], epoch: int | None = None, worker: int = 0) -> Iterator[Tensor]:
        """The presence of one sample after another, bool [M] each, where nobody knows how many there will be.

        Each is incomplete with the probability `rate`; the incomplete ones lose in turn what they lose in a table.

        >>> table = torch.stack(list(itertools.islice(MissingPattern(rate=0.5).stream(("image", "text")), 1000)))
        >>> int((~table).any(dim=1).sum()), (~table).sum(dim=0).tolist()
        (509, [254, 255])
        """
        modalities = tuple(modalities)
        left = torch.from_numpy(~self._losses(STREAM, modalities))
        bits, turn = np.random.PCG64([*self._entropy(epoch), worker]), 0
        while True:
            for raw in (bits.random_raw(STREAM) >> np.uint64(11)).tolist():  # 53 bits
                incomplete = raw < _exact(self.rate) * 2**53
                yield left[turn % STREAM] if incomplete else torch.ones(len(modalities), dtype=torch.bool)
                turn += incomplete

    def _entropy(self, epoch: int | None) -> list[int]:
        split = int.from_bytes(hashlib.sha256(self.split.encode()).digest()[:8], "big")
        return [self.seed, split] if epoch is None else [self.seed, split, epoch]

    def _order(self, n: int, epoch: int | None) -> np.ndarray:
        """The samples in the order in which they become incomplete, the same for every rate and kind."""
        # Ranks of raw bits instead of `Generator.permutation`: NumPy promises that the former never change.
        return np.argsort(np.random.PCG64(self._entropy(epoch)).random_raw(n), kind="stable")

    def _losses(self, incomplete: int, modalities: tuple[str, ...]) -> np.ndarray:
        """What the first, second, .. incomplete sample loses, bool [incomplete, M], True = lost.

        The loss depends on the position alone, never on how many follow: this is what makes the rates nested. Counts
        that do not divide go to the later modalities.
        """
        self._check_kind(modalities)
        size = len(modalities)
        one: np.ndarray = np.eye(size, dtype=bool)
        if self.kind in modalities:
            return one[np.full(incomplete, modalities.index(self.kind))]
        if self.kind == "both" and size == 2:
            ratio = _exact(self.both_ratio)
            lost_first = [count * ratio.numerator // ratio.denominator for count in range(incomplete + 1)]
            return one[1 - np.diff(np.array(lost_first))]
        counts = range(1, size) if self.kind == "any" else (1,)
        sets = np.array([one[list(lost)].any(0) for k in counts for lost in itertools.combinations(range(size), k)])
        return sets[-1 - np.arange(incomplete) % len(sets)]

    def _check_kind(self, modalities: tuple[str, ...]) -> None:
        if len(modalities) < 2 or len(set(modalities)) < len(modalities):
            raise ValueError(f"a missing table needs two or more different modalities, not {modalities}")
        if {"both", "any"} & set(modalities):
            raise ValueError(f"a modality must not be called 'both' or 'any', which are kinds; got {modalities}")
        if self.kind not in ("both", "any", *modalities):
            raise ValueError(f"kind must be 'both', 'any' or one of {modalities}, not {self.kind!r}")
        if self.kind == "both" and len(modalities) > 2 and self.both_ratio != 0.5:
            raise ValueError(f"both_ratio = {self.both_ratio} divides two modalities; there are {len(modalities)}")

    def hash(self, n: int, modalities: Sequence[str]) -> str:
        """SHA-256 of all that decides the table: n, modalities, rate, kind, both_ratio, seed and split."""
        exact = {"rate": str(_exact(self.rate)), "both_ratio": str(_exact(self.both_ratio))}
        content = {"n": _whole("n", n), "modalities": list(modalities), **asdict(self), **exact}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def summary(self, n: int, modalities: Sequence[str]) -> str:
        """The realised counts in a sentence.

        >>> MissingPattern(rate=0.7).summary(90, ("image", "text"))
        '63 of 90 train samples are incomplete: 31 without image, 32 without text (kind both, seed 0).'
        """
        counts = realised(self.table(n, modalities), modalities, self.split)
        return f"{counts} (kind {self.kind}, seed {self.seed})."

    def save(self, path: str | Path, n: int, modalities: Sequence[str]) -> None:
        """Write the table to a safetensors file, with the parameters and hashes that `load` checks."""
        from safetensors.torch import save_file

        table = self.table(n, modalities)
        metadata = {
            "pattern": json.dumps(asdict(self)),
            "modalities": json.dumps(list(modalities)),
            "hash": self.hash(n, modalities),
            "table_hash": _table_hash(table),
        }
        save_file({"present": table}, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> tuple[MissingPattern, Tensor, tuple[str, ...]]:
        """The pattern, the table (bool [n, M]) and the modalities of a file that `save` wrote.

        Raises:
            ValueError: the table or its parameters do not have the hashes that were stored with them.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                table = file.get_tensor("present")
            pattern = cls(**json.loads(metadata["pattern"]))
            modalities = tuple(json.loads(metadata["modalities"]))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a missing table: MissingPattern.save did not write it") from error
        stored = metadata.get("hash"), metadata.get("table_hash")
        if stored != (pattern.hash(len(table), modalities), _table_hash(table)):
            raise ValueError(f"{path} was altered after it was saved: its content does not fit its hash")
        return pattern, table, modalities


def realised(table: Tensor, modalities: Sequence[str], split: str = "") -> str:
    """How many samples of a table, bool [n, M], are incomplete, and what they lack.

    >>> realised(torch.tensor([[True, False], [True, True]]), ("image", "text"), "train")
    '1 of 2 train samples are incomplete: 1 without text'
    """
    lost = Counter(tuple(row) for row in (~table).tolist() if any(row))
    parts = [
        f"{count} without {' and '.join(itertools.compress(modalities, row))}"
        for row, count in sorted(lost.items(), key=lambda item: (sum(item[0]), [not gone for gone in item[0]]))
    ]
    counts = f": {', '.join(parts)}" if parts else ""
    return f"{lost.total()} of {len(table)} {split}{' ' if split else ''}samples are incomplete{counts}"


def import_upstream_table(path: str | Path, modalities: Sequence[str] = ("image", "text")) -> Tensor:
    """A `.pt` table of missing-aware prompts and its successors as bool [n, M], True = present.

    In those files 0 means complete, 1 text lost, 2 image lost; `modalities` must name both. Modalities that the file
    does not know are present.

    Raises:
        ValueError: the file holds anything else.
    """
    if not {"image", "text"} <= set(modalities):
        raise ValueError(f"an upstream table is about image and text; modalities are {tuple(modalities)}")
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a table: it is damaged, or holds more than a tensor") from error
    if not isinstance(table, Tensor) or table.ndim != 1:
        raise ValueError(f"{path} does not hold a table: a tensor with one number per sample was expected")
    unknown = sorted(set(table.tolist()) - {0, *UPSTREAM_LOST.values()})
    if unknown:
        raise ValueError(f"{path} holds {unknown[0]}; an upstream table holds 0, 1 (text lost) and 2 (image lost)")
    present = torch.ones(len(table), len(modalities), dtype=torch.bool)
    for modality, code in UPSTREAM_LOST.items():
        present[:, list(modalities).index(modality)] = table != code
    return present


def _whole(name: str, value: Any) -> int:
    """The value as an int, whichever package's whole number it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"{name} must be a whole number, 0 or larger, not {value!r}")
    return operator.index(value)


def _exact(number: float) -> Fraction:
    """The number as it is written: 0.7 is 7/10, not its binary neighbour."""
    return Fraction(str(number))


def _table_hash(table: Tensor) -> str:
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()
