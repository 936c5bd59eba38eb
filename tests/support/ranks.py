"""Several processes on this machine that talk over gloo: a test file runs itself once for each rank."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SUPPORT = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child of one thread that finds the tests' support, and no GPU."""
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run_ranks(file: str, *arguments: str, world: int = 2, timeout: float = 240) -> list[str]:
    """`python file rank arguments` for each rank, under torchrun's variables: what each printed.

    AssertionError with the output of all where one failed, or where the time is up: a collective that hangs.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        own = environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen([sys.executable, file, str(rank), *arguments], env=own, **pipes))
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    except subprocess.TimeoutExpired as error:
        outputs = [_killed(process) for process in processes]
        raise AssertionError(f"no end after {timeout} s\n" + "\n".join(outputs)) from error
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)
    return outputs


def _killed(process: subprocess.Popen) -> str:
    process.kill()
    return process.communicate()[0]


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
