"""One process of a step, as the report starts it: `... -m u2a_fast.gpu_report.child STEP PART FILE SECONDS gpu|dry`."""

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


def end_with_parent() -> None:
    """A report that is killed cannot stop its processes, so each watches for its end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    end_with_parent()
    name, part, path, seconds, where = sys.argv[1:]
    step, dry = STEPS[name], where == "dry"
    torch.manual_seed(0)
    report = Report(Path(path), dry, time.monotonic() + float(seconds), int(part), 1 if dry else step.parts)
    importlib.import_module(f".{step.module}", __package__).measure(report)


if __name__ == "__main__":
    main()
