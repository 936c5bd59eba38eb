"""Where the padding of a batch stands, worked out once per encoder run and carried along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import host


@dataclass(frozen=True)
class Padding:
    """What attention is told of padding: it takes the number of real keys at the front of each row.

    Attributes:
        mask: bool `[B, S]`, True = a real token, in the order of the tokens that it came with.
        lengths: int64 `[B]`, real tokens of each sample, on the device of the tokens.
        host_mask: `mask` on the CPU; None under static shapes, which wait for no device.
        order: int64 `[B, S]`, a stable reordering that brings real rows to the front; None: they are there. Without
            positions inside the blocks the order does not matter to them.
    """

    mask: Tensor
    lengths: Tensor
    host_mask: Tensor | None
    order: Tensor | None

    def select(self, rows: Tensor) -> Padding:
        """That of the samples `rows`, int64 `[b]` on the CPU."""
        index = host.send(rows, self.mask.device)
        return Padding(
            self.mask[index],
            self.lengths[index],
            None if self.host_mask is None else self.host_mask[rows],
            None if self.order is None else self.order[index],
        )


def padding_of(mask: Tensor | None, on_host: Tensor | None = None, static: bool = False) -> Padding | None:
    """The padding that a mask says; None where every row is real.

    Args:
        mask: bool `[B, S]`, real tokens may stand anywhere in a row; None: all are real.
        on_host: the same mask on the CPU. Without it a mask on a device is copied, which waits for the device.
        static: read no values, and so reorder in any case; also under torch.compile.
    """
    if mask is None:
        return None
    if static or torch.compiler.is_compiling():
        return Padding(mask, mask.sum(dim=1), None, _order(mask))
    if on_host is None:
        (on_host,) = host.to_host(mask)
    if on_host.all():
        return None
    at_the_end = bool((on_host[:, :-1] >= on_host[:, 1:]).all())
    order = None if at_the_end else host.send(_order(on_host), mask.device)
    return Padding(mask, host.send(on_host.sum(dim=1), mask.device), on_host, order)


def _order(mask: Tensor) -> Tensor:
    place = torch.arange(mask.shape[1], device=mask.device)
    return (place + mask.shape[1] * ~mask).argsort(dim=1)  # of keys that all differ: ONNX knows no stable sort


def take_rows(tokens: Tensor, order: Tensor) -> Tensor:
    """tokens `[B, S, D]`, order `[B, S]` -> row `order[b, s]` of sample b at place s."""
    return tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
