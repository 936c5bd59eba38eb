"""How the rows of a batch lie while blocks run: end to end, without padding, samples of equal length together.

Tokens come as `[B, S, D]`, blocks see rows `[1, N, D]`: the real tokens of a sample in their order, then its learned
rows; then the next sample. Attention takes samples of one length as a dense view of their rows (`kernels.Group`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import host, kernels
from .padding import Padding, take_rows
from .rotary import Rotation


class _Joined(torch.autograd.Function):
    """Rows `[n, C]` and `[m, C]` at their places among n + m. The gradient of `index_copy` would keep both."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, others: Tensor, other_places: Tensor) -> Tensor:
        ctx.save_for_backward(places, other_places)
        joined = rows.new_empty(len(rows) + len(others), rows.shape[1])
        return joined.index_copy_(0, places, rows).index_copy_(0, other_places, others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (need, _, need_others, _), (places, other_places) = ctx.needs_input_grad, ctx.saved_tensors
        own = grad.index_select(0, places) if need else None
        return own, None, grad.index_select(0, other_places) if need_others else None, None


@dataclass(frozen=True)
class Places:
    """Where rows stand that were laid end to end without padding.

    Attributes:
        samples: int64 `[B]`, the sample that stands at each place.
        tokens: int64, of every real token its place among B * S.
        rows: int64, of the same tokens their places among the N rows.
        learned: int64 `[B * Q]`, the places of the learned rows.
        starts, ends: int64 `[B]`, the places of each sample's first and last token.
        has_holes: whether padding stands between the tokens of a sample.
    """

    samples: Tensor
    tokens: Tensor
    rows: Tensor
    learned: Tensor
    starts: Tensor
    ends: Tensor
    has_holes: bool = False


@dataclass(slots=True)  # frozen, it would take ten times as long to make, which a block alone does at each call
class Layout:
    """How the rows of B samples lie; not to be changed.

    Attributes:
        groups: `((samples, rows, rows), ...)`, in the order of the rows; or where each sample ends (`of_plan`).
        suffix: learned rows at the end of each sample.
        lengths: int64 `[B]`, real tokens, where padding stays and is hidden instead (static shapes).
        places: where they stand; None: as in `[B, S + Q]`.
        length: S.
        order: int64 `[B, S]`, the column that each token had before real ones were brought to the front; None: its own.
        tables, rotations: by type of layers, the rotary angles of all places and of all rows.
    """

    groups: tuple[kernels.Group, ...] | kernels.Ends
    suffix: int = 0
    lengths: Tensor | None = None
    places: Places | None = None
    length: int = 0
    order: Tensor | None = None
    tables: Mapping[str, Rotation] = field(default_factory=dict)
    rotations: Mapping[str, Rotation] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return sum(group.samples for group in self.groups) if self.places is None else len(self.places.samples)

    def positions(self, device: torch.device) -> Tensor:
        """int64 `[N]`: the column of each token among S; learned rows follow the last one of their sample."""
        after, at = torch.arange(self.suffix, device=device), self.places
        behind = self._behind(device)[:, None] + after  # [B, Q]
        if at is None:
            columns = torch.arange(self.length, device=device).expand(self.batch, -1)
            return torch.cat([columns if self.order is None else self.order, behind], dim=1).flatten()
        columns = at.tokens.new_empty(len(at.rows) + len(at.learned)).index_copy(0, at.rows, at.tokens % self.length)
        return columns.index_copy(0, at.learned, behind[at.samples].flatten())

    def _behind(self, device: torch.device) -> Tensor:
        """int64 `[B]`, in the order of the batch: the position behind each sample's last token."""
        if self.places is not None:
            last = self.places.rows.new_empty(len(self.places.rows) + len(self.places.learned))
            last = last.index_copy(0, self.places.rows, self.places.tokens % self.length)[self.places.ends]
            return torch.empty_like(last).index_copy(0, self.places.samples, last) + 1
        if self.lengths is None:
            return torch.full((self.batch,), self.length, device=device)
        last = (self.lengths[:, None] - 1).clamp(min=0)  # of a sample without a real token the first is one
        return (last if self.order is None else self.order.gather(1, last))[:, 0] + 1

    def uneven_positions(self, device: torch.device) -> Tensor | None:
        """`positions` where they may not be those of neighbours: padding between the tokens of a sample."""
        has_holes = self.order is not None if self.places is None else self.places.has_holes
        return self.positions(device) if has_holes else None

    def turned(self, tables: Mapping[str, Rotation]) -> Layout:
        """The same with rotary angles. tables: by type of layers, of all places that a row of a sample can take."""
        if not tables:
            return self
        positions = self.positions(next(iter(tables.values())).cos.device)
        return replace(self, tables=tables, rotations={kind: table.at(positions) for kind, table in tables.items()})

    def rotation_behind(self, kind: str, rows: int, first: int = 0, arranged: bool = False) -> Rotation:
        """Angles `[B * rows, Dh / 2]` of rows that come `first` rows after all others of their sample.

        In the order of the batch; `arranged`: in that of the layout.
        """
        table = self.tables[kind]
        device = table.cos.device
        positions = self._behind(device)[:, None] + torch.arange(rows, device=device) + self.suffix + first
        return table.at((self.arranged(positions) if arranged else positions).flatten())

    def arranged(self, each: Tensor) -> Tensor:
        """`[B, ...]` in the order of the batch -> in that of the rows."""
        return each if self.places is None else each[self.places.samples]

    def with_queries(self, rows: int) -> tuple[kernels.Group, ...] | kernels.Ends:
        """The groups where `rows` rows of each sample ask."""
        if isinstance(self.groups, kernels.Ends):
            keys = self.groups.keys
            ends = torch.arange(len(keys), device=keys.device).clamp(max=self.batch) * rows  # fillers do not ask
            return kernels.Ends(ends.to(keys.dtype), keys, rows, self.groups.most_keys)
        return tuple(kernels.Group(group.samples, rows, group.keys) for group in self.groups)

    def pack(self, tokens: Tensor) -> Tensor:
        """`[B, S, D]` -> the real rows end to end, `[1, n, D]`; where padding stays, `[B, S, D]` with it at the end."""
        if self.places is None:
            return tokens if self.order is None else take_rows(tokens, self.order)
        return tokens.flatten(0, 1).index_select(0, self.places.tokens)[None]

    def join(self, rows: Tensor, learned: Tensor) -> Tensor:
        """The rows of the tokens and learned rows, `[B, Q, C]` of each sample or `[1, Q, C]` of all -> all rows.

        `[1, n, C]` -> `[1, N, C]`, or `[B, S, C]` -> `[B, S + Q, C]` where there is no padding.
        """
        at, shared = self.places, len(learned) == 1
        if at is None:
            own = learned.to(rows.dtype)
            return kernels.assemble(rows, suffix=learned[0]) if shared else torch.cat([rows, own], dim=1)
        each = learned.expand(len(at.samples), -1, -1) if shared else learned[at.samples]
        return _Joined.apply(rows[0], at.rows, each.flatten(0, 1).to(rows.dtype), at.learned)[None]

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Of all rows `[N, C]` those of the tokens, `[n, C]`."""
        if self.places is not None:
            return rows.index_select(0, self.places.rows)
        return rows.view(self.batch, self.length + self.suffix, rows.shape[1])[:, : self.length].flatten(0, 1)

    def unpack(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """All rows -> `[B, S + Q, D]`, tokens at their own places, zeros (or anything) at padding. shape: (B, S)."""
        at, (batch, length) = self.places, shape
        if at is None:
            if self.order is None:
                return rows
            tokens = take_rows(rows[:, :length], self.order.argsort(dim=1))
            return torch.cat([tokens, rows[:, length:]], dim=1)
        tokens = rows.new_zeros(batch * length, rows.shape[2]).index_copy(0, at.tokens, rows[0][at.rows])
        tokens = tokens.view(batch, length, rows.shape[2])
        return torch.cat([tokens, self.of_each(rows[:, at.learned], self.suffix)], 1) if self.suffix else tokens

    def read(self, last: bool, device: torch.device) -> tuple[Tensor, tuple[kernels.Group, ...] | kernels.Ends]:
        """Where a sample's first (or last) token and its learned rows stand, `[B * (1 + Q)]`, and their groups."""
        if self.places is None:
            batch, rows, _ = self.groups[0]
            starts = torch.arange(batch, device=device) * rows
            ends = starts + (self.length if self.lengths is None else self.lengths.clamp(min=1)) - 1
            learned = starts[:, None] + torch.arange(rows - self.suffix, rows, device=device)
        else:
            starts, ends = self.places.starts, self.places.ends
            learned = self.places.learned.view(len(starts), self.suffix)
        places = torch.cat([(ends if last else starts)[:, None], learned], dim=1)
        return places.flatten(), self.with_queries(1 + self.suffix)

    def of_each(self, rows: Tensor, count: int) -> Tensor:
        """`count` rows of each sample, `[1, B * R, D]` or `[B, R, D]` -> `[B, R, D]` in the order of the batch."""
        each = rows.view(self.batch, count, rows.shape[2])
        return each if self.places is None else torch.empty_like(each).index_copy(0, self.places.samples, each)


def dense(
    batch: int, length: int, suffix: int = 0, lengths: Tensor | None = None, order: Tensor | None = None
) -> Layout:
    """The layout of `[B, S, D]` tokens that stay as they are."""
    return Layout((kernels.Group(batch, length + suffix, length + suffix),), suffix, lengths, None, length, order)


@dataclass(frozen=True)
class PlanSizes:
    """What of a plan is part of a graph's shape.

    Attributes:
        batch: samples. tokens: rows of tokens, spare ones too. suffix: learned rows of each sample.
        longest: no sample has more rows. fillers: samples that the spare rows make.
    """

    batch: int
    tokens: int
    suffix: int
    longest: int
    fillers: int


def plan_of(mask: Tensor, here: Tensor, length: int, suffix: int, parts: int) -> tuple[Tensor, PlanSizes]:
    """`packed` for graphs, whose shapes are fixed: all places in one int64 tensor, the number of rows one of `parts`.

    Spare rows are copies of the first token, in samples of their own that nobody reads.

    Args:
        mask: bool `[B, S]` on the CPU.
        here: bool `[B]`, who has the modality; of the others only the learned rows are there.
        length: tokens of a sample as they are embedded, S or more.
    """
    batch, longest = len(mask), length + suffix
    real = (_with_first(mask) & here[:, None]).numpy()  # whose calls take a third of torch's time; the GPU waits
    lengths = real.sum(axis=1)
    ends = (lengths + suffix).cumsum()
    of_sample, column = real.nonzero()
    step = -(-batch * longest // parts)
    spare, fillers = -int(ends[-1]) % step, -(-step // longest)
    total = int(ends[-1]) + spare
    behind = np.minimum(ends[-1] + longest * np.arange(1, fillers + 1), total)  # where fillers end
    plan: list[np.ndarray] = [
        np.concatenate([of_sample * length + column, np.zeros(spare, np.int64)]),  # tokens
        np.concatenate([np.arange(len(column)) + suffix * of_sample, np.arange(total - spare, total)]),  # rows
        ((ends - suffix)[:, None] + np.arange(suffix)).ravel(),  # learned
        np.minimum(ends - suffix - lengths, total - 1),  # starts
        np.concatenate([[0], ends, behind]),
    ]
    sizes = PlanSizes(batch, len(column) + spare, suffix, longest, fillers)
    return torch.from_numpy(np.concatenate(plan)), sizes


def of_plan(plan: Tensor, sizes: PlanSizes) -> Layout:
    """The layout that a plan describes, on the device of `plan`."""
    batch, tokens, suffix, longest, fillers = sizes.batch, sizes.tokens, sizes.suffix, sizes.longest, sizes.fillers
    parts = plan.split([tokens, tokens, batch * suffix, batch, batch + 1 + fillers])
    ends, samples = parts[4].to(torch.int32), torch.arange(batch, device=plan.device)
    last = parts[4][1 : batch + 1] - suffix - 1
    places = Places(samples, tokens=parts[0], rows=parts[1], learned=parts[2], starts=parts[3], ends=last)
    return Layout(kernels.Ends(ends, ends, longest, longest), suffix, places=places, length=longest - suffix)


def _with_first(mask: Tensor) -> Tensor:
    """A sample without a real token keeps its first."""
    return mask | (~mask.any(dim=1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0))


def packed(mask: Tensor, device: torch.device, suffix: int = 0) -> Layout:
    """The layout of the real rows alone, worked out on the CPU and sent to `device` without waiting.

    mask: bool `[B, S]` on the CPU. A sample without a real token keeps its first.
    """
    mask = _with_first(mask)
    lengths, order = mask.sum(dim=1).sort(stable=True)
    of_sample, column = mask[order].nonzero().unbind(1)
    ends = (lengths + suffix).cumsum(0)  # behind the last row of each sample
    learned = (ends - suffix)[:, None] + torch.arange(suffix, device=mask.device)
    each, counts = lengths.unique_consecutive(return_counts=True)
    sizes = zip(counts.tolist(), (each + suffix).tolist(), strict=True)
    where = {
        "samples": order,
        "tokens": order[of_sample] * mask.shape[1] + column,
        "rows": torch.arange(len(column), device=mask.device) + suffix * of_sample,  # learned rows stand between
        "learned": learned.flatten(),
        "starts": ends - suffix - lengths,
        "ends": ends - suffix - 1,
    }
    has_holes = bool((mask[:, 1:] & ~mask[:, :-1]).sum(dim=1).gt(~mask[:, 0]).any())
    places = Places(**{name: host.send(index, device) for name, index in where.items()}, has_holes=has_holes)
    groups = tuple(kernels.Group(samples, rows, rows) for samples, rows in sizes)
    return Layout(groups, suffix, places=places, length=mask.shape[1])


def layout_of(tokens: Tensor, padding: Padding | None, suffix: int = 0) -> Layout:
    """The layout for tokens `[B, S, D]`: packed where the padding is known on the CPU, dense otherwise."""
    batch, length, _ = tokens.shape
    if padding is not None and padding.host_mask is not None:
        return packed(padding.host_mask, tokens.device, suffix)
    return dense(batch, length, suffix, *((None, None) if padding is None else (padding.lengths, padding.order)))
