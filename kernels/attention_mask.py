"""Which keys a row of attention sees: what padding leaves, what is not after it, what lies in a window around it.

A sample's keys are [token rows | `suffix` rows], and the rows of q are the last of them. `seen` is everywhere

    lengths [B]     token rows from the lengths[b]-th on are hidden
    suffix          these rows are never hidden by lengths or window, and see as if there were no window
    causal          keys after a row's own place are hidden
    window          token rows further than this from a token row are hidden from it: a distance of places,
    positions       or of positions [B, S]
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_effect(queries, keys, lengths, suffix, causal, window, positions):
    """`seen` without what hides nothing: causality from the last row, a window from samples that lie within it."""
    if window is None or (positions is None and keys - suffix <= window + 1):
        window = positions = None
    return lengths, suffix, causal and queries > 1, window, positions


def needs_mask(queries, keys, lengths, suffix, causal, window, positions) -> bool:
    """Whether there is more to hide than what the causality of a library's function hides."""
    return lengths is not None or window is not None or (causal and queries != keys)


def hidden_by_lengths(lengths: Tensor, keys: int, suffix: int) -> Tensor:
    """Token rows of padding, bool [B, 1, 1, keys]."""
    place = torch.arange(keys, device=lengths.device)
    return ((place >= lengths[:, None]) & (place < keys - suffix))[:, None, None]


def hidden_by_place(queries, keys, device, suffix, causal, window, positions) -> Tensor:
    """What causality and window hide, bool [B or 1, 1, queries, keys]; one of the two there is."""
    place = torch.arange(keys, device=device)
    own = place[keys - queries :, None]
    if window is None:
        return (own < place)[None, None]
    at = place[None] if positions is None else positions
    hidden = at[:, None] < at[:, keys - queries :, None] - window
    if not causal or positions is not None:  # what comes before a row may still be beyond its position
        hidden |= at[:, None] > at[:, keys - queries :, None] + window
    tokens = keys - suffix
    hidden[:, :, tokens:] = False
    hidden[:, max(0, tokens - (keys - queries)) :] = False
    return (hidden | (own < place) if causal else hidden)[:, None]


def hidden(queries, keys, device, lengths, suffix, causal, window, positions) -> Tensor:
    """All that is hidden, bool [B or 1, 1, queries or 1, keys]; `needs_mask`."""
    by_place = causal or window is not None
    place = hidden_by_place(queries, keys, device, suffix, causal, window, positions) if by_place else None
    if lengths is None:
        return place
    padding = hidden_by_lengths(lengths, keys, suffix)
    return padding if place is None else padding | place


def blind_rows(queries, keys, lengths, suffix, causal, window, positions) -> Tensor | None:
    """Rows that see no key, [B, 1, queries or 1, 1]; None where every row sees one."""
    if lengths is None or (suffix > 0 and not causal):
        return None
    if window is not None:  # rows of padding, too far from the tokens
        seen = lengths, suffix, causal, window, positions
        return hidden(queries, keys, lengths.device, *seen).all(3, keepdim=True)
    empty = (lengths == 0)[:, None, None, None]
    return (
        empty & (torch.arange(keys - queries, keys, device=lengths.device) < keys - suffix)[:, None]
        if causal
        else empty
    )
