"""Passes that only move memory: counted bytes over time, as a fraction of what a copy reaches on this GPU.

LayerNorm with S = h A^T (assemble_norm_project) forward and backward, LayerNorm alone, int8 rows, class tokens and
proxies; and GELU, the library's, as a yardstick. ViT-B, batch 64, bf16, every operand counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import layer_norm, quantize_rows, set_backend, substitute
from ..kernels.assemble_aten import Leaves
from ..kernels.assemble_aten import backward_aten as assemble_backward_aten
from ..kernels.assemble_aten import forward_aten as assemble_forward_aten
from ..kernels.assemble_backward import backward_triton as assemble_backward_triton
from ..kernels.assemble_norm_project import forward_triton as assemble_forward_triton
from .machine import copy_bandwidth
from .report import Entry, Report
from .timing import compare, rotating

ROUNDS = 50
BATCH, TOKENS, WIDTH, RANKS, CLASS_TOKENS = 64, 197, 768, 24, 2048
Run = tuple[Callable[[], Any], list[Tensor]]  # a call, and what it reads and writes


def measure(report: Report) -> None:
    set_backend("auto")
    copied = report.measure("copy", copy_bandwidth, report.dry)
    for name, make in passes(report).items():
        report.measure(name, time_pass, make, copied.get("gb_per_s"), report.dry)


def time_pass(make: Callable[[], Run], bandwidth: float | None, dry: bool) -> Entry:
    run, moved = make()
    nbytes = sum(t.nbytes for t in moved)
    made = [run, *(call for call, _ in rotating(make, nbytes, dry)[1:])]
    with torch.no_grad():
        timed = compare({"pass": made}, "pass", 3 if dry else ROUNDS, dry)
    reached = nbytes / timed["us"]["pass"] / 1e3
    of_copy = round(reached / bandwidth, 3) if bandwidth else None
    return {"gb_per_s": round(reached, 1), "of_copy": of_copy, "bytes": nbytes, **timed}


def passes(report: Report) -> dict[str, Callable[[], Run]]:
    batch, tokens, width, samples = (2, 5, 32, 16) if report.dry else (BATCH, TOKENS, WIDTH, CLASS_TOKENS)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=report.device, dtype=dtype)

    def rows() -> Tensor:
        return draw(batch, tokens, width)

    def with_result(call: Callable[[], Any], *read: Tensor) -> Run:
        results = call()
        written = [results] if torch.is_tensor(results) else [t for t in results if torch.is_tensor(t)]
        return call, [*read, *written]

    def norm() -> tuple[Tensor, Tensor]:
        return draw(width, dtype=torch.float32), draw(width, dtype=torch.float32)

    def gelu() -> Run:
        x = rows()
        return with_result(lambda: F.gelu(x), x)

    def library_norm() -> Run:
        x, weight, bias = rows(), draw(width), draw(width)
        return with_result(lambda: F.layer_norm(x, (width,), weight, bias), x)

    def our_norm() -> Run:
        x, parameters = rows(), norm()
        return with_result(lambda: layer_norm(x, *parameters), x)

    def int8_rows() -> Run:
        x = rows().flatten(0, 1)
        return with_result(lambda: quantize_rows(x), x)

    def fuse() -> Run:
        present = torch.rand(samples, 2, device=report.device) > 0.35
        c, p = draw(2, samples, width), draw(2, 2, samples, width)
        call, moved = with_result(lambda: substitute(c, p, present), c, p[0])  # the diagonal is not read
        return call, moved

    return {
        "GELU (yardstick)": gelu,
        "LayerNorm, the library's": library_norm,
        "LayerNorm": our_norm,
        "assemble_norm_project": lambda: assemble_forward(report, rows(), norm(), with_result),
        "assemble_norm_project backward": lambda: assemble_backward(report, rows, norm(), with_result),
        "assemble_norm_project backward, no adapter": lambda: assemble_backward(
            report, rows, norm(), with_result, adapter=False
        ),
        "quantize_rows": int8_rows,
        "substitute": fuse,
    }


def assemble_forward(report: Report, x: Tensor, norm: tuple[Tensor, Tensor], finish: Callable[..., Run]) -> Run:
    forward = assemble_forward_aten if report.dry else assemble_forward_triton
    lora_a = torch.randn(RANKS, x.shape[2], device=x.device)
    return finish(lambda: forward(x, None, None, None, None, *norm, lora_a, 1e-6, False, torch.bfloat16, False), x)


def assemble_backward(
    report: Report,
    rows: Callable[[], Tensor],
    norm: tuple[Tensor, Tensor],
    finish: Callable[..., Run],
    adapter: bool = True,
) -> Run:
    backward = assemble_backward_aten if report.dry else assemble_backward_triton
    d_rows, d_h, x = rows(), rows(), rows()
    batch, tokens, width = x.shape
    mean, rstd = torch.zeros(batch * tokens, device=x.device), torch.ones(batch * tokens, device=x.device)
    lora_a = torch.randn(RANKS, width, device=x.device) if adapter else None
    d_s = torch.randn(batch, tokens, RANKS, device=x.device, dtype=x.dtype) if adapter else None
    read = [t for t in (d_rows, d_h, d_s, x, mean, rstd) if t is not None]
    needs = Leaves(True, False, False, False, False, False, adapter)
    saved = x, mean, rstd, *norm, lora_a, None
    return finish(lambda: backward(d_rows, d_h, d_s, *saved, batch, 0, tokens, 1e-6, torch.bfloat16, needs), *read)
