"""compute-sanitizer: memcheck on one small case of every function, racecheck on three, where the tool is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from .cases_modern import CASES
from .report import Entry, NoResult, Report

TOOL, USUAL_PLACE = "compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer"
RACES = ("linear_lowrank", "assemble_norm_project", "attention")
PLAIN = ("attention_rows", "layer_norm", "rms_norm")  # a library's kernels alone
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def measure(report: Report) -> None:
    functions = [name for name in dict.fromkeys(case.function for case in CASES) if name not in PLAIN]
    wanted = [("memcheck", name) for name in functions] + [("racecheck", name) for name in RACES]
    for tool, function in wanted[report.part :: report.parts]:
        report.measure(f"{tool}, {function}", check, tool, function, report)


def check(tool: str, function: str, report: Report) -> Entry:
    path = shutil.which(TOOL) or (USUAL_PLACE if os.path.exists(USUAL_PLACE) else None)
    if report.dry or path is None:
        raise NoResult(f"{TOOL} is not here")
    case = next(case.name for case in CASES if case.function == function and "odd" in case.name)
    command = [path, "--tool", tool, "--report-api-errors", "no"] if tool == "memcheck" else [path, "--tool", tool]
    command += [sys.executable, "-m", f"{__package__}.correctness", function, case, "bf16"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        limit = max(1.0, report.seconds_left)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        raise NoResult("no time left") from None
    counts = SUMMARY.findall(done.stdout + done.stderr)
    if not counts:
        raise NoResult(f"{TOOL} gave no summary: {(done.stdout + done.stderr).strip()[-300:]}")
    faults = sum(int(a or b) for a, b in counts)
    said = [line for line in done.stdout.splitlines() if "=========" in line][:12] if faults else []
    return {"wrong": [f"{faults} found", *said] if faults else [], "case": case}
