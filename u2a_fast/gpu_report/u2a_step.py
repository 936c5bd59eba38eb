"""A training step of U2A, forward and backward: ViT-B/16 and BERT-base, batch 32, texts of 8 to 128 tokens, bf16.

Wall milliseconds (median of interleaved rounds, the base twice), host milliseconds until everything is enqueued, device
milliseconds (sum of the kernels' times), number of kernels and peak memory. Graphs and compiled arms come last: they
may take all of the time that is left. They run in a row too, as steps of training do, which wait for the GPU where
the step itself does.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..kernels import set_backend
from ..methods import U2A
from .models import (
    Inputs,
    Models,
    PeftU2A,
    clear,
    even_lengths,
    loss_of,
    make_batch,
    ours,
    presence_table,
    tiny,
    vit_and_bert,
)
from .report import Entry, NoResult, Report
from .timing import CONTROL, summary

BATCH, SHORTEST, LONGEST = 32, 8, 128
ROUNDS, WARMUP = 15, 3
RUNS, IN_A_ROW = 7, 20
BASE = "ours"
MISSING = {"70% missing": 0.7, "none missing": 0.0}


@dataclass
class Arm:
    """A model and the backend it runs under."""

    model: nn.Module
    backend: str = "auto"
    marks_steps: bool = False  # what graphs of torch.compile gave out before may be overwritten
    trained: list[nn.Parameter] = field(init=False)  # as an optimizer holds them: to find them takes milliseconds

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def step(self, batch: Inputs) -> None:
        if self.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        set_backend(self.backend)
        clear(self.trained)
        loss_of(self.model(**batch)).backward()


def measure(report: Report) -> None:
    dtype = torch.bfloat16
    models = tiny(report.device, dtype) if report.dry else vit_and_bert(report.device, dtype)
    batches = {name: batch_of(report, rate, dtype) for name, rate in MISSING.items()}
    packed, where = ours(models), ours(models, absent="where")
    arms = {BASE: Arm(packed), "torch backend": Arm(packed, "torch"), "where": Arm(where)}
    report.measure("PEFT", add_peft, arms, models)
    for name, batch in batches.items():
        report.measure(name, time_arms, arms, batch, report.dry)
        for arm in () if report.dry else arms:
            report.measure(f"{name}: kernels of {arm}", kernels_of, arms[arm], batch)
    for name, make in prepared_arms(models).items():
        measure_prepared(report, name, make, arms[BASE], batches)


def add_peft(arms: dict[str, Arm], models: Models) -> Entry:
    arms["PEFT SDPA"] = Arm(PeftU2A(models).train())
    return {}


def batch_of(report: Report, missing: float, dtype: torch.dtype) -> Inputs:
    batch, longest, side = (4, 12, 32) if report.dry else (BATCH, LONGEST, 224)
    lengths = even_lengths(batch, min(SHORTEST, longest), longest)
    return make_batch(lengths, presence_table(batch, missing), report.device, dtype, side)


# ------------------------------------------------------------------------------------------------------------- timing
def time_arms(arms: dict[str, Arm], batch: Inputs, dry: bool) -> Entry:
    """Wall and host milliseconds of a step of each arm, and its peak memory."""
    wall: dict[str, list[float]] = {name: [] for name in (*arms, BASE + CONTROL)}
    host: dict[str, list[float]] = {name: [] for name in wall}
    order, rounds, warmup = random.Random(0), 2 if dry else ROUNDS, 1 if dry else WARMUP
    for turn in range(rounds + warmup):
        for name in order.sample(list(wall), len(wall)):
            arm = arms[name.removesuffix(CONTROL)]
            synchronise(dry)
            start = time.perf_counter()
            arm.step(batch)
            enqueued = time.perf_counter()
            synchronise(dry)
            if turn >= warmup:
                host[name].append(1e3 * (enqueued - start))
                wall[name].append(1e3 * (time.perf_counter() - start))
    found = {"wall": in_milliseconds(summary(wall, BASE)), "host": in_milliseconds(summary(host, BASE))}
    return found | {"peak_mib": {name: peak_of(arm, batch, dry) for name, arm in arms.items()}}


def time_in_a_row(arm: Arm, batch: Inputs) -> Entry:
    """Milliseconds of a step where nobody waits between steps: median, and half the spread of the runs."""
    runs = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            arm.step(batch)
        torch.cuda.synchronize()
        runs.append(1e3 * (time.perf_counter() - start) / IN_A_ROW)
    middle = statistics.median(runs)
    return {"in_a_row_ms": round(middle, 3), "spread": round((max(runs) - min(runs)) / (2 * middle), 4)}


def in_milliseconds(found: dict[str, Any]) -> dict[str, Any]:
    return {"ms": found.pop("us"), **found}


def synchronise(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()


def peak_of(arm: Arm, batch: Inputs, dry: bool) -> float | None:
    if dry:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.step(batch)
    synchronise(dry)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def kernels_of(arm: Arm, batch: Inputs) -> Entry:
    """Device milliseconds and number of kernels of a step, and the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    arm.step(batch)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        arm.step(batch)
        torch.cuda.synchronize()
    events = [e for e in profiled.key_averages() if e.device_type.name == "CUDA"]
    events = sorted(events, key=lambda e: -e.self_device_time_total)
    most = {e.key[:90]: [round(e.self_device_time_total / 1e3, 3), e.count] for e in events[:16]}
    total = sum(e.self_device_time_total for e in events)
    return {"device_ms": round(total / 1e3, 3), "kernels": sum(e.count for e in events), "most": most}


# --------------------------------------------------------------------------------------------------- graph and compile
def prepared_arms(models: Models) -> dict[str, Callable[[], Any]]:
    """Models whose first steps take long."""
    return {
        "graph": lambda: with_graphs(ours(models)),
        "PEFT compiled": lambda: torch.compile(PeftU2A(models).train()),
        "PEFT reduce-overhead": lambda: torch.compile(PeftU2A(models).train(), mode="reduce-overhead"),
        "where graph": lambda: with_graphs(ours(models, absent="where")),
        "where compiled": lambda: torch.compile(ours(models, absent="where")),
    }


def with_graphs(model: U2A) -> U2A:
    model.capture()
    return model


def measure_prepared(report: Report, name: str, make: Callable[[], Any], base: Arm, batches: dict[str, Inputs]) -> None:
    """Prepare an arm by running it, then time it beside the base."""
    made: list[Arm] = []

    def prepare() -> Entry:
        if report.dry:
            raise NoResult("nothing is captured or compiled in a dry run")
        torch._dynamo.reset()
        arm, start = Arm(make(), marks_steps=True), time.perf_counter()
        for batch in (*batches.values(), *batches.values()):
            arm.step(batch)
        torch.cuda.synchronize()
        made.append(arm)
        return {"preparing_seconds": round(time.perf_counter() - start, 1)}

    report.measure(f"preparing {name}", prepare)
    for arm in made:
        for missing, batch in batches.items():
            report.measure(f"{missing}: {name}", time_arms, {BASE: base, name: arm}, batch, report.dry)
            report.measure(f"{missing}: steps of {name} in a row", time_in_a_row, arm, batch)
            report.measure(f"{missing}: kernels of {name}", kernels_of, arm, batch)
