"""One process of a step, as the report starts it: `... -m u2a_fast.gpu_report.child STEP PART FILE SECONDS gpu|dry`."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

import torch

from .report import Report
from .steps import STEPS


def main() -> None:
    name, part, path, seconds, where = sys.argv[1:]
    step, dry = STEPS[name], where == "dry"
    torch.manual_seed(0)
    report = Report(Path(path), dry, time.monotonic() + float(seconds), int(part), 1 if dry else step.parts)
    importlib.import_module(f".{step.module}", __package__).measure(report)


if __name__ == "__main__":
    main()
