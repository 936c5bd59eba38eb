"""What a step writes: one JSON file, renewed after every measurement, so that none is lost with the next."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Entry = dict[str, Any]
RESTART = 75  # exit status of a process whose CUDA context is lost: what remains needs a new one


class NoResult(Exception):
    """Why there is nothing to report, in a sentence."""


@dataclass
class Report:
    """The results of one process: `{name: entry}` with entry["state"] done, wrong, error or "no result".

    A file that is there already is continued: what it holds is not measured again, and the measurement that was under
    way when the process before died is an error.
    """

    path: Path
    dry: bool
    deadline: float  # of time.monotonic()
    part: int = 0
    parts: int = 1
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.entries = json.loads(self.path.read_text())
        for entry in self.entries.values():
            if entry["state"] == "running":
                entry |= {"state": "error", "error": "the process died here"}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, name: str, run: Callable[..., Entry], *arguments: Any) -> Entry:
        """Note what `run(*arguments)` returns, or how it failed; a "wrong" in it that is not empty makes it wrong."""
        if name in self.entries:
            return self.entries[name]
        self._note(name, {"state": "running"})
        start = time.monotonic()
        try:
            if self.seconds_left <= 0:
                raise NoResult("no time left")
            values = run(*arguments)
            entry = {"state": "wrong" if values.get("wrong") else "done", **values}
        except NoResult as reason:
            entry = {"state": "no result", "why": str(reason)}
        except Exception as error:
            traceback.print_exc()
            entry = {"state": "error", "error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
        self._note(name, entry | {"seconds": round(time.monotonic() - start, 2)})
        if _context_is_lost(entry):
            sys.stdout.flush()
            os._exit(RESTART)
        return entry

    def _note(self, name: str, entry: Entry) -> None:
        self.entries[name] = entry
        write_json(self.path, self.entries)
        print(name, json.dumps(entry)[:400], flush=True)


def write_json(path: Path, content: Any) -> None:
    """At once or not at all: a process may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1))
    beside.replace(path)


def _context_is_lost(entry: Entry) -> bool:
    said = entry.get("error", "")
    return any(sign in said for sign in ("CUDA error", "AcceleratorError", "CUBLAS_STATUS_EXECUTION_FAILED"))
