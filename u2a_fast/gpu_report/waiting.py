"""How often a training step waits for the GPU, and whether it runs as one CUDA graph.

With absent="where" never; with absent="pack" once at most, for a batch that lies on the GPU. A graph that
`model.capture` made gives the same bits at every replay; with absent="where", whose shapes are the eager step's, it
gives the eager step's loss and gradients bit for bit, for other values too. (d) holds the packed one to fp64.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..kernels import set_backend
from .report import Entry, NoResult, Report

if TYPE_CHECKING:
    from .whole_models import Found, Inputs

MOST = {"where": 0, "pack": 1}


def measure(report: Report) -> None:
    set_backend("auto")
    for absent in MOST:
        report.measure(f"synchronisations, {absent}", count_waits, report, absent)
    for absent in MOST:
        report.measure(f"graph, {absent}", check_capture, report, absent)


def on_it(report: Report, absent: str) -> tuple[nn.Module, Inputs]:
    if report.dry:
        raise NoResult("a CPU waits for nothing and has no graphs")
    from .whole_models import batch_of, on_device, u2a  # transformers takes seconds, and a dry run needs none

    dtype = torch.bfloat16
    return u2a(dtype, absent=absent).to(report.device), on_device(batch_of(dtype), report.device)


def count_waits(report: Report, absent: str) -> Entry:
    model, batch = on_it(report, absent)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(**batch).loss.backward()

    for _ in range(2):  # compiles, and fills what is kept from step to step
        step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [
        f"{str(w.message).split(' (Triggered')[0]} ({'/'.join(Path(w.filename).parts[-2:])}:{w.lineno})"
        for w in caught
        if "called a synchronizing" in str(w.message)
    ]
    most = MOST[absent]
    wrong = [f"waits {len(waits)} times, {most} at most were promised"] if len(waits) > most else []
    return {"wrong": wrong, "waits": waits}


def check_capture(report: Report, absent: str) -> Entry:
    eager, batch = on_it(report, absent)
    from .whole_models import plainly

    if differing(plainly(eager, batch), plainly(eager, batch)):
        raise NoResult("the eager step differs from itself: a library adds up in any order")
    other = {**batch, "image": {"pixel_values": batch["image"]["pixel_values"].flip(1)}}
    model = copy.deepcopy(eager)
    model.capture(batch)
    first, of_other, again = (plainly(model, given) for given in (batch, other, batch))
    wrong = [f"a second replay differs in {name}" for name in differing(again, first)[:3]]
    if absent == "where":
        wrong += [f"{name} is not the eager step's" for name in differing(first, plainly(eager, batch))[:3]]
        wrong += [f"with other values, {name} is not" for name in differing(of_other, plainly(eager, other))[:3]]
    return {"wrong": wrong}


def differing(a: Found, b: Found) -> list[str]:
    """What two steps do not have in common, bit for bit."""
    return [n for n in sorted(a.keys() | b.keys()) if n not in a or n not in b or not a[n].equal(b[n])]
