"""Attention over texts laid end to end against masked SDPA over padded ones; and a U2A step over int8 and nf4 weights.

Attention: 32 texts of 8 to 128 tokens, 12 heads of 64, bf16. Steps: ViT-B and BERT-base cut to 4 layers, device time of
one step (the sum of its kernels' times), as a ratio to bf16 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import Group, attention_rows, set_backend
from .models import Inputs, Models, clear, even_lengths, make_batch, ours, presence_table, tiny, vit_and_bert
from .report import Entry, NoResult, Report
from .timing import compare
from .u2a_step import Arm, kernels_of

TEXTS, SHORTEST, LONGEST, HEADS, WIDTH = 32, 8, 128, 12, 64
LAYERS, ROUNDS = 4, 30
STORED = ("int8", "int8_w8a8", "nf4")


def measure(report: Report) -> None:
    set_backend("auto")
    report.measure("varlen attention, forward", time_attention, report, False)
    report.measure("varlen attention, forward and backward", time_attention, report, True)
    dtype = torch.bfloat16
    models = tiny(report.device, dtype) if report.dry else vit_and_bert(report.device, dtype, num_hidden_layers=LAYERS)
    texts, longest, side = (4, 12, 32) if report.dry else (TEXTS, LONGEST, 224)
    lengths, present = even_lengths(texts, 4, longest), presence_table(texts, 0.7)
    batch = make_batch(lengths, present, report.device, dtype, side)
    plain = report.measure("step, bf16", time_stored, None, models, batch, report)
    for mode in STORED:
        report.measure(f"step, {mode}", time_stored, mode, models, batch, report, plain.get("device_ms"))


def time_attention(report: Report, backward: bool) -> Entry:
    texts, longest, heads = (4, 12, 2) if report.dry else (TEXTS, LONGEST, HEADS)
    lengths = even_lengths(texts, SHORTEST, longest).sort().values
    rows, shape = int(lengths.sum()), (3, texts, heads, longest, WIDTH)
    groups = [Group(int((lengths == n).sum()), int(n), int(n)) for n in lengths.unique()]
    made = [operands(rows, shape, report.device) for _ in range(2 if report.dry else 10)]
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(report.device)

    def laid_end_to_end(qkv: Tensor) -> Tensor:
        return attention_rows(qkv, None, heads, groups)[0]

    def masked(padded: Tensor) -> Tensor:
        q, k, v = padded.unbind()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    arms = {
        "masked SDPA": [differentiated(masked, padded, backward) for _, padded in made],
        "varlen": [differentiated(laid_end_to_end, qkv, backward) for qkv, _ in made],
    }
    timed = compare(arms, "masked SDPA", 3 if report.dry else ROUNDS, report.dry)
    return {"ratio": round(timed["us"]["masked SDPA"] / timed["us"]["varlen"], 3), "real_rows": rows, **timed}


def operands(rows: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """q, k and v side by side of all rows; and padded, [3, texts, heads, longest, width]."""
    qkv = torch.randn(rows, 3 * shape[2] * shape[4], device=device, dtype=torch.bfloat16, requires_grad=True)
    return qkv, torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)


def differentiated(forward: Callable[[Tensor], Tensor], leaf: Tensor, backward: bool) -> Callable[[], Any]:
    """A call of `forward`; with `backward` its gradient too. All of it on the stream it is called on."""

    def run() -> Any:
        if backward:
            out = forward(leaf)
            return torch.autograd.grad(out, leaf, out.detach())
        with torch.no_grad():
            return forward(leaf)

    return run


def time_stored(
    mode: str | None, models: Models, batch: Inputs, report: Report, plain_ms: float | None = None
) -> Entry:
    """Device time of a step over weights stored as `mode`, and the bytes of the model."""
    try:
        model = ours(models, quantization=mode)
    except ImportError as error:
        raise NoResult(str(error).splitlines()[0]) from None
    arm = Arm(model)
    stored = {p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}
    entry: Entry = {"mib": round(sum(stored.values()) / 2**20, 1)}
    if report.dry:
        arm.step(batch)
        return entry
    for _ in range(2):
        arm.step(batch)
    entry |= kernels_of(arm, batch)
    clear(arm.trained)
    return entry | {"ratio": round(entry["device_ms"] / plain_ms, 3) if plain_ms else None}
