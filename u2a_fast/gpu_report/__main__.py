"""Measure and prove, on the GPU that is here, what the package claims; each step in processes of its own.

    python -m u2a_fast.gpu_report --minutes 10 --out report/
    python -m u2a_fast.gpu_report --dry --out report/          the whole script on a CPU, tiny, to see that it works
    python -m u2a_fast.gpu_report --steps a,c,i

No network, random weights, clocks as they are. Every step writes its JSON after each measurement and is stopped when
its share of the time is over. The page is `README.md` in the folder. Exit status 1: a wrong result or an error in a
step that proves something (c, d, e, f); 0 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .page import write_page
from .report import write_json
from .steps import STEPS, cores

Results = dict[str, dict[str, Any]]  # by step: title, status, seconds, entries
AT_ONCE_DRY = 2
PAGE_SECONDS = 8
WORST_FIRST = ("failed", "over its time", "done")


@dataclass(frozen=True)
class Job:
    step: str
    part: int

    def file(self, folder: Path) -> Path:
        return folder / "parts" / f"{self.step}-{self.part}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m u2a_fast.gpu_report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long all steps may take together")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the page and its JSON")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"which of {','.join(STEPS)}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, in tiny sizes: whether the script works")
    options = parser.parse_args(arguments)
    chosen = options.steps.split(",")
    if unknown := sorted(set(chosen) - set(STEPS)):
        parser.error(f"--steps takes letters out of {','.join(STEPS)}, not {','.join(unknown)}")
    results = run_steps([name for name in STEPS if name in chosen], options.minutes * 60, options.out, options.dry)
    write_page(results, options.out)
    print(f"{options.out / 'README.md'}: " + ", ".join(f"{name} {step['status']}" for name, step in results.items()))
    return exit_status(results)


def exit_status(results: Results) -> int:
    """1 where something that was to be proved is wrong, or could not be run for an error."""
    return int(any(faults(results)))


def faults(results: Results) -> Iterator[str]:
    for name, step in results.items():
        if not STEPS[name].proves:
            continue
        if step["status"] == "failed":
            yield f"step {name} failed"
        for what, entry in step["entries"].items():
            if entry["state"] in ("wrong", "error"):
                yield f"{name}: {what}"


def run_steps(chosen: list[str], seconds: float, folder: Path, dry: bool) -> Results:
    """Run the steps, those that take no times beside each other. What one leaves of its time falls to the others."""
    end = time.monotonic() + seconds - PAGE_SECONDS
    results: Results = {}
    together = [[name for name in chosen if not STEPS[name].alone]]
    groups = [chosen] if dry else [[name] for name in chosen if STEPS[name].alone]
    if not dry and together[0]:
        groups.insert(int("a" in chosen), together[0])
    shares = [max(STEPS[name].share for name in group) for group in groups]
    for i, group in enumerate(groups):
        left = max(1.0, end - time.monotonic())
        limit = left * shares[i] / sum(shares[i:])
        results |= run_group(group, limit, folder, dry)
        write_page(results, folder, pictures=False)  # whoever stops the script has what there was time for
    return {name: results[name] for name in sorted(results)}


def run_group(group: list[str], limit: float, folder: Path, dry: bool) -> Results:
    jobs = [Job(name, part) for name in group for part in range(1 if dry else STEPS[name].parts)]
    for job in jobs:
        job.file(folder).unlink(missing_ok=True)
    deadline = time.monotonic() + limit
    threads = max(1, cores() // len(jobs))
    with ThreadPoolExecutor(AT_ONCE_DRY if dry else len(jobs)) as pool:
        ended = dict(zip(jobs, pool.map(lambda job: run_job(job, deadline, folder, dry, threads), jobs), strict=True))
    results = {}
    for name in group:
        own = [job for job in jobs if job.step == name]
        results[name] = {
            "title": STEPS[name].title,
            "status": min((ended[job][0] for job in own), key=WORST_FIRST.index),
            "seconds": max(ended[job][1] for job in own),
            "dry": dry,
            "entries": {what: entry for job in own for what, entry in entries_of(job.file(folder)).items()},
        }
        write_json(folder / f"{name}.json", results[name])
    return results


def entries_of(path: Path) -> dict[str, Any]:
    """What a process wrote; a measurement that was under way when it was stopped is no result."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    for entry in entries.values():
        if entry["state"] == "running":
            entry |= {"state": "no result", "why": "stopped: the time of the step was over"}
    return entries


def run_job(job: Job, deadline: float, folder: Path, dry: bool, threads: int) -> tuple[str, float]:
    """How a process of a step ended (see WORST_FIRST), and its seconds."""
    start = time.monotonic()
    return run_until(job, deadline, folder, dry, threads), round(time.monotonic() - start, 1)


def run_until(job: Job, deadline: float, folder: Path, dry: bool, threads: int) -> str:
    """Run a process of a step; another after it where it died at a measurement, for those that remain."""
    log = folder / "logs" / f"{job.step}-{job.part}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    while (left := deadline - time.monotonic()) > 0:
        before = entries_of(job.file(folder))
        with log.open("a") as output:
            command, here = command_of(job, folder, left, dry), environment(job.step, threads)
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=here, start_new_session=True
            )
            try:
                status = process.wait(left)
            except subprocess.TimeoutExpired:
                return "over its time"
            finally:
                end_group(process)
        if status == 0:
            return "done"
        if len(entries_of(job.file(folder))) == len(before):  # it got nowhere: it would not the next time either
            return "failed"
    return "over its time"


def command_of(job: Job, folder: Path, seconds: float, dry: bool) -> list[str]:
    where = "dry" if dry else "gpu"
    return [
        *(sys.executable, "-m", f"{__package__}.child", job.step, str(job.part)),
        *(str(job.file(folder)), f"{seconds:.1f}", where, str(os.getpid())),
    ]


def end_group(process: subprocess.Popen) -> None:
    """End a step's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(step: str, threads: int) -> dict[str, str]:
    set_here = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    set_here["OMP_NUM_THREADS"] = str(threads)
    if not STEPS[step].alone:  # without it, deterministic algorithms refuse cuBLAS; where times are taken it might cost
        set_here["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return os.environ | set_here


if __name__ == "__main__":
    sys.exit(main())
