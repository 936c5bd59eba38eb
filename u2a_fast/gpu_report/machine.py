"""The device, its driver, the versions in use, and two ceilings: a copy of 1 GiB and a product of 8192^3 in bf16."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch

from .report import Entry, Report
from .timing import compare

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "flash-attn", "numpy", "u2a-fast")
COPIED, SIDE = 2**30, 8192
ROUNDS = 20


def measure(report: Report) -> None:
    report.measure("versions", versions)
    report.measure("device", device, report.dry)
    report.measure("copy", copy_bandwidth, report.dry)
    report.measure("product", product_rate, report.dry)


def versions() -> Entry:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(dry: bool) -> str:
    return platform.machine() if dry else torch.cuda.get_device_name()


def device(dry: bool) -> Entry:
    if dry:
        return {"name": device_name(dry), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": found.L2_cache_size / 2**20,
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cores": os.cpu_count(),
        "nvidia_smi": _nvidia_smi(),
    }


def _nvidia_smi() -> str:
    """Driver, clocks and power as they are: read, never set."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no nvidia-smi: {error}"


def copy_bandwidth(dry: bool) -> Entry:
    """Bytes read and written in a second, by a kernel: as a node of a graph a copy may go to a slower copy engine."""
    where = "cpu" if dry else "cuda"
    source = torch.empty((COPIED >> 8 if dry else COPIED) // 2, dtype=torch.bfloat16, device=where).normal_()
    target = torch.empty_like(source)
    timed = compare({"copy": [lambda: torch.neg(source, out=target)]}, "copy", 3 if dry else ROUNDS, dry)
    return {"gb_per_s": round(2 * source.nbytes / timed["us"]["copy"] / 1e3, 1), **timed}


def product_rate(dry: bool) -> Entry:
    """Operations in a second on random data: zeros draw less power, and clocks rise."""
    side, where = (128, "cpu") if dry else (SIDE, "cuda")
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    timed = compare({"product": [lambda: a @ b]}, "product", 3 if dry else ROUNDS, dry)
    return {"tflops": round(2 * side**3 / timed["us"]["product"] / 1e6, 2), **timed}
