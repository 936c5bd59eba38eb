"""One process of a step: `python -m u2a_fast.gpu_report.child STEP PART FILE SECONDS gpu|dry PID`, PID the report's."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from .report import Report
from .steps import STEPS


def end_with(parent: int) -> None:
    """A report that is killed cannot stop its processes, so each watches for its end."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run(name: str, part: str, path: str, seconds: str, where: str) -> None:
    step, dry = STEPS[name], where == "dry"
    torch.manual_seed(0)
    report = Report(Path(path), dry, time.monotonic() + float(seconds), int(part), 1 if dry else step.parts)
    importlib.import_module(f".{step.module}", __package__).measure(report)


def main() -> None:
    *given, parent = sys.argv[1:]
    end_with(int(parent))
    run(*given)


if __name__ == "__main__":
    main()
