"""The processes that train together, as `accelerate launch` or `torchrun` started them; most often there is one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from torch import distributed, nn

if TYPE_CHECKING:
    from transformers import Trainer

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


def leave() -> None:
    """Take leave of the others at the end of a script.

    Threads of gloo outlive the group of a model under DDP (torch 2.13). One that is still to free what it sent waits
    for Python, whose end would abort the process: it gets its turn before.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.1)


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


def check_shards(trainer: Trainer, checkpoint: str | None) -> None:
    """Refuse what accelerate would not shard though it was told to, and to go on otherwise than a run began.

    Raises:
        ValueError: there is no GPU, or it is FSDP1, which cannot shard integers; a checkpoint of the other kind.
    """
    sharded = trainer.accelerator.is_fsdp2
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not sharded:
        raise ValueError("accelerate shards this model on GPUs only, with fsdp_version: 2 in its file: use DDP")
    if checkpoint and sharded != any(Path(checkpoint).glob("pytorch_model_fsdp*")):
        how = "DDP or a single process" if sharded else "FSDP2"
        raise ValueError(f"{checkpoint} was written under {how}: resume it under the same, in fewer or more processes")


def collect_for_evaluation(model: nn.Module) -> None:
    """Let `encode` and `fuse` of a sharded model collect what `forward` would: `evaluate` calls them by themselves."""
    if processes().distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import register_fsdp_forward_method

        for name in ("encode", "fuse"):
            register_fsdp_forward_method(model, name)
