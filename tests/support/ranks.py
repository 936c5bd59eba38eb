"""Several processes on this machine that talk over gloo: forks of this one, or what a launcher starts."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from forks import run_forks

SUPPORT = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child of one thread that finds the tests' support, and no GPU."""
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run_ranks(run: Callable[[], None], world: int = 2, timeout: float = 240, **told: str) -> list[str]:
    """What `run()` prints in a fork of this process for each rank, under torchrun's variables and those of `settings`.

    AssertionError where one failed, or where the time is up: a collective that hangs.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world), **told}

    def as_rank(rank: int) -> None:
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        AcceleratorState._reset_state(reset_partial_state=True)  # of runs that this process has seen
        run()

    return run_forks([partial(as_rank, rank) for rank in range(world)], timeout)


def settings(config_file: str, world: int) -> dict[str, str]:
    """The variables that `accelerate launch --config_file` sets for its processes, besides torchrun's."""
    given = ["--config_file", config_file, "--num_processes", str(world), "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if os.environ.get(name) != value}


def run_command(command: Sequence[str], timeout: float = 240, **more: str) -> str:
    """What a launcher and its children print; all of them are killed when the time is up."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment(**more), start_new_session=True, **pipes)
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {timeout} s\n{process.communicate()[0]}") from error
    assert process.returncode == 0, output
    return output


def launched(
    launcher: str, script: Sequence[str], options: Mapping[str, str] | None = None, world: int = 2
) -> list[str]:
    """The command that starts `script` (a file or `-m module`, and its arguments) in `world` processes."""
    port = str(free_port())
    if launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}"]
        return [*start, f"--master_port={port}", *script]
    given = [part for name, value in (options or {}).items() for part in (f"--{name}", value)]
    start = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={world}"]
    return [*start, f"--main_process_port={port}", *given, *script]
