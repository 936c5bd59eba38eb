"""Rotary positions (RoFormer, arXiv 2104.09864): the angles by which a row's queries and keys are turned.

An encoder's own rotary module says the angles; a table of them `[rows, Dh / 2]` has one row for each place that a row
of a sample can take. Learned rows take the places behind the last token, where pictures have no angle.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """cos and sin `[N, Dh / 2]` of the angles of N rows.

    >>> Rotation(torch.ones(3, 2), torch.zeros(3, 2)).at(torch.tensor([0, 2])).cos.shape
    torch.Size([2, 2])
    """

    cos: Tensor
    sin: Tensor

    def at(self, places: Tensor | None) -> Rotation:
        """Those of the rows at `places`; None: all, as they are."""
        return self if places is None else Rotation(*(part.index_select(0, places) for part in self))


class _Rotary(nn.Module):
    """Frequencies as they were computed, whatever a model is cast to: Hugging Face's modules have plain buffers."""

    def _apply(self, fn: Callable, recurse: bool = True) -> _Rotary:
        """As in `nn.Module`, but buffers move without changing their dtype: rounded, they would be other angles."""
        exact = [(part, name, t) for part in self.modules() for name, t in part._buffers.items() if t is not None]
        super()._apply(fn, recurse)
        for part, name, buffer in exact:
            moved = part._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                part._buffers[name] = buffer.to(moved.device)
        return self


class TextRotary(_Rotary):
    """Angles along a text: Hugging Face's rotary module, asked for the positions 0, 1, 2, ...

    Args:
        angles: `(x, position_ids [1, T]) -> cos, sin [1, T, Dh]`, both halves of Dh alike.
        layer_type: given to it besides, where angles differ between local and global layers.
    """

    def __init__(self, angles: nn.Module, layer_type: str | None = None):
        super().__init__()
        self.angles = angles
        kinds = getattr(angles, "rope_type", None)
        self.arguments = (layer_type,) if isinstance(kinds, dict) and layer_type in kinds else ()

    def forward(self, tokens: int, rows: int, like: Tensor) -> Rotation:
        """The table for `rows` places. like: has the dtype (fp32 or wider) and the device of the result."""
        positions = torch.arange(rows, device=like.device)[None]
        cos, sin = self.angles(like, positions, *self.arguments)
        half = cos.shape[-1] // 2
        return Rotation(cos[0, :, :half], sin[0, :, :half])


class PatchRotary(_Rotary):
    """Angles over a square of patches (DINOv3); the rows before them (class and register tokens) are not turned.

    Args:
        angles: `(pixel_values [B, C, height, width]) -> cos, sin [patches, Dh]`; of the pictures it asks their sizes.
        patch: height and width of a patch in pixels.
        prefix: rows in front of the patches.
    """

    def __init__(self, angles: nn.Module, patch: tuple[int, int], prefix: int):
        super().__init__()
        self.angles, self.patch, self.prefix = angles, patch, prefix

    def forward(self, tokens: int, rows: int, like: Tensor) -> Rotation:
        """As `TextRotary`; tokens: of a picture, prefix and patches."""
        patches = max(0, tokens - self.prefix)
        # The pixels of a square. Nobody's picture has no patch, and there are no angles of none.
        side = max(math.isqrt(patches * self.patch[0] * self.patch[1]), *self.patch)
        cos, sin = self.angles(like.new_empty(1, 0, side, side))
        turned = slice(self.prefix, tokens)
        table = Rotation(like.new_ones(rows, cos.shape[-1] // 2), like.new_zeros(rows, cos.shape[-1] // 2))
        for part, own in zip(table, (cos, sin), strict=True):
            part[turned] = own[:patches, : part.shape[1]]
        return table


def rotary_of(angles: nn.Module, config: Any, layer_type: str | None) -> nn.Module:
    """The rotary positions of one type of layers, from Hugging Face's module for them.

    Raises:
        ValueError: angles that depend on the length of the batch.
    """
    kinds = getattr(angles, "rope_type", "default")
    kind = kinds.get(layer_type, "default") if isinstance(kinds, dict) else kinds
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"rotary positions of type {kind!r} are not supported: their angles depend on the longest text of a batch"
        )
    if "pixel_values" not in inspect.signature(angles.forward).parameters:
        return TextRotary(angles, layer_type)
    patch = config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return PatchRotary(angles, patch, prefix=1 + config.num_register_tokens)
