"""A few weights of an encoder, by which one that was changed is told from what lies under its name."""

from __future__ import annotations

import math
import re

import torch

from .base import Encoder

BLOCKS = PLACES = 4  # so many blocks, and weights along each side of their linears
FORM = re.compile(r"\d{1,15} (float16|bfloat16|float32|float64)( -?(\d+(\.\d+)?(e[+-]\d+)?|inf|nan))*", re.ASCII)


def fingerprint(encoder: Encoder) -> str:
    """How many numbers it has, their dtype, and some of them; nothing of one that is quantised or has no values."""
    blocks = encoder.blocks[:: max(1, len(encoder.blocks) // BLOCKS)]
    linears = [linear for block in blocks for linear in block.linears]
    unseen = any(linear.storage != "float" or linear.weight.is_meta for linear in linears)
    if unseen or torch._C._len_torch_dispatch_stack():  # under fake tensors
        return ""
    with torch.no_grad():
        weights = [
            linear.weight[_places(linear.weight.shape[0]), _places(linear.weight.shape[1])] for linear in linears
        ]
        found = torch.cat(weights).double().tolist() if weights else []
    count = sum(p.numel() for name, p in encoder.named_parameters() if "lora_" not in name)
    return " ".join([str(count), str(encoder.dtype).removeprefix("torch."), *(f"{weight:.9g}" for weight in found)])


def is_fingerprint(text: str) -> bool:
    """Whether `fingerprint` may have said so.

    >>> is_fingerprint("12 float32 0.5 -1e-05"), is_fingerprint("12 weights")
    (True, False)
    """
    return not text or FORM.fullmatch(text) is not None


def differ(saved: str, found: str) -> bool:
    """Whether two encoders of which both fingerprints are known differ by more than rounding to their dtypes.

    >>> differ("12 float32 0.5 -1.5", "12 bfloat16 0.5 -1.5"), differ("12 float32 0.5", "12 float32 0.51")
    (False, True)
    """
    if not saved or not found:
        return False
    (count, dtype, *weights), (count_now, dtype_now, *weights_now) = saved.split(), found.split()
    step = 4 * max(torch.finfo(getattr(torch, each)).eps for each in (dtype, dtype_now))
    pairs = zip(map(float, weights), map(float, weights_now), strict=False)
    return count != count_now or any(not math.isclose(a, b, rel_tol=step, abs_tol=1e-7) for a, b in pairs)


def _places(count: int) -> list[int]:
    return [(2 * i + 1) * count // (2 * PLACES) for i in range(PLACES)]
