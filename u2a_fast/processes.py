"""The processes that train together, as `accelerate launch` or `torchrun` started them; most often there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Place = TypeVar("Place", str, Path)


def processes() -> PartialState:
    """Who they are and which of them this is: joined where a launcher started several, on CPUs too.

    >>> processes().num_processes, processes().is_main_process
    (1, True)
    """
    return PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Whether there is nothing but CPUs: unless told so, accelerate lets processes on CPUs train each for itself."""
    return not torch.accelerator.is_available()


def is_main() -> bool:
    """Whether this is the process that prints and writes for all."""
    return processes().is_main_process


def for_main(folder: Place) -> Place | None:
    """Where to write: the folder in the main process, nowhere in others."""
    return folder if is_main() else None


def least(value: int) -> int:
    """The smallest value that any of them has."""
    return min(gather_object([value])) if processes().num_processes > 1 else value


def share(batch_size: int) -> int:
    """What each of them takes of a step's samples.

    Raises:
        ValueError: some would take more than others.
    """
    count = processes().num_processes
    if batch_size % count:
        raise ValueError(f"--batch-size {batch_size} cannot be shared by {count} processes: make it a multiple")
    return batch_size // count


def refuse_shards() -> None:
    """ValueError where accelerate was told to shard models with FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("u2a-fast train runs under DDP: to shard a model, see examples/train_distributed.py")
