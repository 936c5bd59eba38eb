"""`assemble` and `assemble_norm_project` in ATen calls, forward and backward (assemble.py has the formulas)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend, products
from .backend import cast
from .norm_aten import norm_aten, norm_backward_aten
from .quantize import quantize_rows_aten


class Assembled(NamedTuple):
    """What the forward writes; None for what was not asked for or would equal what is there already."""

    rows: Tensor | None  # [B, T, D], where there are learned rows
    h: Tensor | None  # [B, T, D] in the compute dtype, unless it equals the rows
    s: Tensor | None  # [B, T, R]
    mean: Tensor | None  # [B * T], with a LayerNorm
    rstd: Tensor | None  # [B * T], with a norm
    q: Tensor | None  # [B, T, D] int8
    scale: Tensor | None  # [B * T] fp32


class Leaves(NamedTuple):
    """One entry for each operand that may train: whether it needs a gradient, its dtype, or its gradient."""

    tokens: Any
    prefix: Any
    suffix: Any
    mask_token: Any
    norm_weight: Any
    norm_bias: Any
    lora_a: Any


# ------------------------------------------------------------------------------------------------------------- forward
def present_first(present: Tensor) -> Tensor:
    """Sample numbers [B], those present first, each kind in its own order; no device synchronisation."""
    return torch.argsort(present.to(torch.uint8), descending=True, stable=True)


def _join(tokens, prefix, suffix, present, mask_token) -> Tensor:
    batch = tokens.shape[0] if present is None else present.shape[0]
    first = 0 if prefix is None else prefix.shape[0]
    last = first + tokens.shape[1]
    rows = tokens.new_empty(batch, last + (0 if suffix is None else suffix.shape[0]), tokens.shape[2])
    if prefix is not None:
        rows[:, :first] = prefix
    if suffix is not None:
        rows[:, last:] = suffix
    middle = rows[:, first:last]
    if present is None:
        middle.copy_(tokens)
        return rows
    fill = tokens.new_zeros(1) if mask_token is None else mask_token.to(tokens.dtype)
    if tokens.shape[0] == batch:
        torch.where(present[:, None, None], tokens, fill, out=middle)
    else:
        order, packed = present_first(present), tokens.shape[0]
        middle.index_copy_(0, order[:packed], tokens)
        middle.index_copy_(0, order[packed:], fill.expand(batch - packed, *tokens.shape[1:]))
    return rows


def forward_aten(
    tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, rms, dtype, quantize
):
    """`Assembled`; with `quantize`, q and scale in place of h."""
    rows = h = s = mean = rstd = q = scale = None
    if prefix is not None or suffix is not None or present is not None:
        rows = _join(tokens, prefix, suffix, present, mask_token)
    source = tokens if rows is None else rows
    if norm_weight is not None:
        h, mean, rstd = norm_aten(source, norm_weight, norm_bias, eps, rms)
        h, mean, rstd = cast(h, dtype), None if rms else mean.view(-1), rstd.view(-1)
    elif dtype != tokens.dtype:
        h = source.to(dtype)
    if lora_a is not None:
        s = products.linear(source if h is None else h, lora_a.to(dtype))
    if quantize:
        written = source if h is None else h
        q, scale = quantize_rows_aten(written.flatten(0, 1))
        q, h = q.view(written.shape), None
    return Assembled(rows, h, s, mean, rstd, q, scale)


# ------------------------------------------------------------------------------------------------------------ backward
def backward_aten(
    d_rows, d_h, d_s, rows, mean, rstd, norm_weight, norm_bias, lora_a, present, packed, first, last, eps, dtype, needs
):
    """`Leaves`, the gradients that `needs` asks for. Token rows are first .. last of the T rows. No mean: RMSNorm."""
    d_weight = d_bias = d_a = None
    if needs.lora_a:
        h = rows if norm_weight is None else norm_aten(rows, norm_weight, norm_bias, eps, mean is None)[0]
        d_a = products.mm(d_s.flatten(0, 1).t(), h.to(d_s.dtype).flatten(0, 1))
    if d_s is not None and any(needs[:6]):  # all but lora_a go through h
        s_a = d_s.flatten(0, 1), lora_a.to(d_s.dtype)
        flat = products.mm(*s_a) if d_h is None else products.addmm(d_h.flatten(0, 1), *s_a)
        d_h = flat.view(*d_s.shape[:2], lora_a.shape[1])
    if norm_weight is not None and d_h is not None:
        mask = [any(needs[:4]), needs.norm_weight, needs.norm_bias]
        d_h, d_weight, d_bias = norm_backward_aten(d_h, rows, mean, rstd, norm_weight, norm_bias, mask)
    if not any(needs[:4]):  # no row
        return Leaves(None, None, None, None, d_weight, d_bias, d_a)
    if d_h is None:
        total = d_rows.clone()
    else:
        owned = d_s is not None or norm_weight is not None  # d_h came out of a product or a norm
        total = d_h if owned and d_h.dtype == dtype else d_h.to(dtype, copy=not owned)
        if d_rows is not None:
            total.add_(d_rows)
    return Leaves(*_split(total, present, packed, first, last, needs), d_weight, d_bias, d_a)


def _split(d_rows, present, packed, first, last, needs):
    """d_rows [B, T, D] -> gradients of tokens [packed, S, D], prefix, suffix and mask_token."""
    wide = backend.wide(d_rows.dtype)
    d_tokens = d_prefix = d_suffix = d_mask = None
    middle = d_rows[:, first:last]
    if needs.tokens:
        if present is None:
            d_tokens = middle.contiguous()
        elif packed == present.shape[0]:
            d_tokens = torch.where(present[:, None, None], middle, 0)
        else:
            d_tokens = middle.index_select(0, present_first(present)[:packed])
    if needs.prefix:
        d_prefix = d_rows[:, :first].sum(0, dtype=wide)
    if needs.suffix:
        d_suffix = d_rows[:, last:].sum(0, dtype=wide)
    if needs.mask_token:
        d_mask = torch.where(present[:, None], 0, middle.sum(1, dtype=wide)).sum(0)
    return d_tokens, d_prefix, d_suffix, d_mask
