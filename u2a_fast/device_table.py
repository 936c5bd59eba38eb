"""Which product was measured to be faster on a device: the library's over joined weights, or ours that fuses both.

`python -m u2a_fast.gpu_report` writes the table into the user's cache; `capture` reads it once. Nothing is measured
while a model trains, and a device that no report has seen takes the library's products.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import torch

VERSIONS = ("torch", "triton", "u2a-fast")


def path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "u2a_fast" / "device_table.json"


def key_of(device_name: str) -> str:
    """What a measurement holds for: a device under these versions."""
    return ", ".join([device_name, *(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)])


def entry_of(n: int, k: int, rows: int) -> str:
    """The entry of a product [rows, k] x [k, n] in bf16; rows as the power of two that they do not exceed."""
    return f"bf16 N={n} K={k} M={1 << max(0, rows - 1).bit_length()}"


def of_device(device: torch.device) -> dict[str, Any]:
    """The entries of a GPU; empty where none were measured, or the file cannot be read."""
    try:
        table = json.loads(path().read_text())
        return table.get(key_of(torch.cuda.get_device_name(device)), {})
    except (OSError, ValueError, AttributeError, importlib.metadata.PackageNotFoundError):
        return {}


def own_wins(entries: dict[str, Any], n: int, k: int) -> bool:
    """Whether our product was faster for a weight [n, k] at most of the row counts that were measured."""
    verdicts = [entry["wins"] == "own" for name, entry in entries.items() if name.startswith(f"bf16 N={n} K={k} M=")]
    return sum(verdicts) * 2 > len(verdicts)
