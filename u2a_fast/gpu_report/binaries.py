"""Every binary, built for this GPU in parallel: seconds, registers, spills, whether it fits.

What is built is what the compile report builds (kernels/compile_cases.py), all of it for this one target.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from ..kernels.backend import triton
from ..kernels.compile_cases import CASES
from ..kernels.compile_report import DEVICES
from ..kernels.compile_report import report as compiled_rows
from ..kernels.targets import architecture
from .report import Entry, NoResult, Report
from .steps import cores

DRY_FUNCTION, DRY_TARGET = "quantize_rows", "sm_90"
SHOWN = ("kernel", "variant", "shape", "rank", "regs", "spills", "shared_bytes", "occupancy")


def measure(report: Report) -> None:
    report.measure("binaries", build, report)


def build(report: Report) -> Entry:
    if triton is None:
        raise NoResult("Triton is not installed")
    target = DRY_TARGET if report.dry else target_here()
    if target not in DEVICES:
        raise NoResult(f"the compile report has no data sheet of {target}")
    cases = [replace(case, targets=(DEVICES[target].binaries or target,)) for case in CASES]
    if report.dry:
        cases = [case for case in cases if case.function == DRY_FUNCTION]
    start = time.monotonic()
    rows = compiled_rows(cases, (target,), processes=1 if report.dry else cores())
    seconds = time.monotonic() - start
    binaries = {tuple(row[name] for name in SHOWN if name != "shape"): row for row in rows}
    too_large = [label(row) for row in binaries.values() if row["occupancy"] == 0]
    spilling = [f"{label(row)}: {row['spills']} bytes" for row in binaries.values() if row["spills"]]
    shown = [{name: row[name] for name in SHOWN if name != "shape"} for row in binaries.values()]
    return {
        "target": target,
        "build_seconds": round(seconds, 1),
        "count": len(binaries),
        "too_large": too_large,
        "spilling": spilling,
        "rows": shown,
    }


def target_here() -> str:
    """Asked for in a process of its own: one that has touched CUDA should not be forked, as the compile report does."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(architecture, 0).result()


def label(row: dict) -> str:
    return f"{row['kernel']} ({row['variant']}, r = {row['rank']})"
