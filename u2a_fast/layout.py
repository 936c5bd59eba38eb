"""How the rows of a batch lie while blocks run: end to end, without padding, samples of equal length together.

Tokens come as `[B, S, D]`, blocks see rows `[1, N, D]`: the real tokens of a sample in their order, then its learned
rows; then the next sample. Attention takes samples of one length as a dense view of their rows (`kernels.Group`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import host, kernels
from .padding import Padding


@dataclass(frozen=True)
class Layout:
    """Where the rows of B samples lie.

    Attributes:
        groups: `((samples, rows, rows), ...)`, in the order of the rows.
        suffix: learned rows at the end of each sample.
        lengths: int64 `[B]`, real tokens, where padding stays and is hidden instead (static shapes).
        samples: int64 `[B]`, the sample that stands at each place; None: in their own order.
        tokens: int64, of every real token its place among B * S; None: there is no padding, and all stand in order.
        rows: int64, of the same tokens their places among the N rows.
        learned: int64 `[B * Q]`, the places of the learned rows.
        starts, ends: int64 `[B]`, the places of each sample's first and last token. None of these without padding.
    """

    groups: tuple[kernels.Group, ...]
    suffix: int = 0
    lengths: Tensor | None = None
    samples: Tensor | None = None
    tokens: Tensor | None = None
    rows: Tensor | None = None
    learned: Tensor | None = None
    starts: Tensor | None = None
    ends: Tensor | None = None

    def pack(self, tokens: Tensor) -> Tensor:
        """`[B, S, D]` -> the real rows end to end, `[1, n, D]`; as they are where there is no padding."""
        return tokens if self.tokens is None else tokens.flatten(0, 1).index_select(0, self.tokens)[None]

    def join(self, rows: Tensor, learned: Tensor) -> Tensor:
        """The rows of the tokens and learned rows `[Q, C]`, or `[B, Q, C]` of each sample -> all rows.

        `[1, n, C]` -> `[1, N, C]`, or `[B, S, C]` -> `[B, S + Q, C]` where there is no padding.
        """
        if self.tokens is None and learned.dim() == 2:
            return kernels.assemble(rows, suffix=learned)
        if self.tokens is None:
            return torch.cat([rows, learned.to(rows.dtype)], dim=1)
        each = learned.expand(len(self.samples), -1, -1) if learned.dim() == 2 else learned[self.samples]
        joined = rows.new_empty(len(rows[0]) + each.shape[0] * each.shape[1], rows.shape[2])
        joined = joined.index_copy(0, self.rows, rows[0])
        return joined.index_copy(0, self.learned, each.flatten(0, 1).to(rows.dtype))[None]

    def unpack(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """All rows -> `[B, S + Q, D]`, zeros where a token is padding. shape: (B, S)."""
        if self.tokens is None:
            return rows
        batch, length = shape
        tokens = rows.new_zeros(batch * length, rows.shape[2]).index_copy(0, self.tokens, rows[0][self.rows])
        tokens = tokens.view(batch, length, rows.shape[2])
        return torch.cat([tokens, self.of_each(rows[:, self.learned], self.suffix)], 1) if self.suffix else tokens

    def read(self, last: bool, device: torch.device) -> tuple[Tensor, tuple[kernels.Group, ...]]:
        """Where a sample's first (or last) token and its learned rows stand, `[B * (1 + Q)]`, and their groups."""
        starts, ends, learned = self.starts, self.ends, self.learned
        if starts is None:
            batch, rows, _ = self.groups[0]
            starts = torch.arange(batch, device=device) * rows
            ends = starts + rows - self.suffix - 1
            learned = ends[:, None] + torch.arange(1, 1 + self.suffix, device=device)
        token = (ends if last else starts)[:, None]
        places = token if self.suffix == 0 else torch.cat([token, learned.view(len(token), self.suffix)], dim=1)
        return places.flatten(), self.with_queries(1 + self.suffix)

    def with_queries(self, rows: int) -> tuple[kernels.Group, ...]:
        """The groups where `rows` rows of each sample ask."""
        return tuple(kernels.Group(group.samples, rows, group.keys) for group in self.groups)

    def of_each(self, rows: Tensor, count: int) -> Tensor:
        """`count` rows of each sample, `[1, B * R, D]` or `[B, R, D]` -> `[B, R, D]` in the order of the batch."""
        each = rows.view(self.batch, count, rows.shape[2])
        return each if self.samples is None else torch.empty_like(each).index_copy(0, self.samples, each)

    @property
    def batch(self) -> int:
        return sum(group.samples for group in self.groups)


def dense(batch: int, length: int, suffix: int = 0, lengths: Tensor | None = None) -> Layout:
    """The layout of `[B, S, D]` tokens that stay as they are."""
    return Layout((kernels.Group(batch, length + suffix, length + suffix),), suffix, lengths)


def packed(padding: Padding, suffix: int = 0) -> Layout:
    """The layout of the real rows alone; worked out on the CPU, and sent to the device without waiting.

    A sample without a real token keeps its first.
    """
    mask = padding.host_mask
    mask = mask | (~mask.any(dim=1, keepdim=True) & (torch.arange(mask.shape[1]) == 0))
    lengths = mask.sum(dim=1)
    lengths, order = lengths.sort(stable=True)
    of_sample, column = mask[order].nonzero().unbind(1)
    ends = (lengths + suffix).cumsum(0)  # behind the last row of each sample
    starts = ends - suffix - lengths
    place = torch.arange(len(column)) + suffix * of_sample  # rows before it that are learned
    learned = (ends - suffix)[:, None] + torch.arange(suffix)
    each, counts = lengths.unique_consecutive(return_counts=True)
    groups = tuple(
        kernels.Group(n, m + suffix, m + suffix) for n, m in zip(counts.tolist(), each.tolist(), strict=True)
    )
    tokens = order[of_sample] * mask.shape[1] + column
    where = order, tokens, place, learned.flatten() if suffix else None, starts, ends - suffix - 1
    device = padding.mask.device
    return Layout(groups, suffix, None, *(None if t is None else host.send(t, device) for t in where))


def layout_of(tokens: Tensor, padding: Padding | None, suffix: int = 0) -> Layout:
    """The layout for tokens `[B, S, D]`: packed where the padding is known on the CPU, dense otherwise."""
    batch, length, _ = tokens.shape
    if padding is not None and padding.host_mask is not None:
        return packed(padding, suffix)
    return dense(batch, length, suffix, None if padding is None else padding.lengths)
