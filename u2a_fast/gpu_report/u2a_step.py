"""A training step of U2A, forward and backward: ViT-B/16 and BERT-base, batch 32, texts of 8 to 128 tokens, bf16.

Wall milliseconds (median of interleaved rounds, the base twice), host milliseconds until everything is enqueued, device
milliseconds (sum of the kernels' times), number of kernels and peak memory. Compiled arms come last: they may take all
of the time that is left.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels import set_backend
from .models import Inputs, Models, PeftU2A, clear, even_lengths, loss_of, make_batch, ours, presence_table
from .models import tiny, vit_and_bert
from .report import Entry, NoResult, Report
from .timing import CONTROL, summary

BATCH, SHORTEST, LONGEST = 32, 8, 128
ROUNDS, WARMUP = 15, 3
BASE = "ours"
MISSING = {"70% missing": 0.7, "none missing": 0.0}


@dataclass
class Arm:
    """A model and the backend it runs under; `prepare` is given the batch once before it runs."""

    model: nn.Module
    backend: str = "auto"
    prepare: Callable[[Inputs], None] = lambda batch: None

    def step(self, batch: Inputs) -> None:
        set_backend(self.backend)
        clear(self.model)
        loss_of(self.model(**batch)).backward()


def measure(report: Report) -> None:
    dtype = torch.bfloat16
    models = tiny(report.device, dtype) if report.dry else vit_and_bert(report.device, dtype)
    batches = {name: batch_of(report, rate, dtype) for name, rate in MISSING.items()}
    packed, where = ours(models), ours(models, absent="where")
    arms = {BASE: Arm(packed), "torch backend": Arm(packed, "torch"), "where": Arm(where)}
    with contextlib.suppress(NoResult):
        arms["PEFT SDPA"] = Arm(PeftU2A(models).train())
    for name, batch in batches.items():
        report.measure(name, lambda n=name, b=batch: time_arms(arms, b, report.dry) | {"batch": n})
        if not report.dry:
            for arm in arms:
                report.measure(f"{name}: kernels of {arm}", lambda a=arm, b=batch: kernels_of(arms[a], b))
    for name, batch in batches.items():
        report.measure(f"{name}: graph", lambda b=batch: captured(models, arms[BASE], b, report.dry))
    for name, make in compiled_arms(models).items():
        arm = report_arm(report, name, make, batches["70% missing"])
        for missing, batch in batches.items() if arm is not None else ():
            run = lambda a=arm, n=name, b=batch: time_arms({BASE: arms[BASE], n: a}, b, report.dry)  # noqa: E731
            report.measure(f"{missing}: {name}", run)
            if not report.dry:
                report.measure(f"{missing}: kernels of {name}", lambda a=arm, b=batch: kernels_of(a, b))


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
def captured(models: Models, base: Arm, batch: Inputs, dry: bool) -> Entry:
    """The step as one CUDA graph, as `model.capture` makes it."""
    model = ours(models)
    if dry or not hasattr(model, "capture"):
        raise NoResult("graphs need a GPU" if dry else "the model has no capture")
    set_backend("auto")
    model.capture(batch)
    arms = {BASE: base, "graph": Arm(model)}
    return time_arms(arms, batch, dry) | {"kernels": kernels_of(arms["graph"], batch)}


def compiled_arms(models: Models) -> dict[str, Callable[[], nn.Module]]:
    def theirs(mode: str) -> nn.Module:
        return torch.compile(PeftU2A(models).train(), mode=mode)  # type: ignore[return-value]

    return {
        "PEFT compiled": lambda: theirs("default"),
        "where compiled": lambda: torch.compile(ours(models, absent="where")),  # type: ignore[dict-item,return-value]
        "PEFT reduce-overhead": lambda: theirs("reduce-overhead"),
    }


def report_arm(report: Report, name: str, make: Callable[[], nn.Module], batch: Inputs) -> Arm | None:
    """Compile an arm by running it; None where that fails."""
    made: list[Arm] = []

    def compile_it() -> Entry:
        if report.dry:
            raise NoResult("nothing is compiled in a dry run")
        torch._dynamo.reset()
        arm, start = Arm(make()), time.perf_counter()
        for _ in range(3):
            arm.step(batch)
        torch.cuda.synchronize()
        made.append(arm)
        return {"compile_seconds": round(time.perf_counter() - start, 1)}

    report.measure(f"compiling {name}", compile_it)
    return made[0] if made else None


def all_arms(entries: dict[str, Entry], missing: str) -> Iterator[tuple[str, float, float]]:
    """(arm, wall ms, noise) of every arm timed on the batch with `missing`."""
    for name, entry in entries.items():
        if name.split(": ")[0] == missing and "wall" in entry:
            for arm, taken in entry["wall"]["ms"].items():
                if name == missing or arm not in (BASE, BASE + CONTROL):
                    yield arm, taken, entry["wall"]["noise"]
