"""Forks of this process: they have imported all that it has, which takes longer than most of what they run.

A fork has no GPU: CUDA does not survive it.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch


def start(run: Callable[[], None], log: Path) -> int:
    """The id of a process that calls `run` and ends with 0, or with 1 where that raised; what it prints is in `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException), open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)  # makes the pool anew that the fork has lost, before two threads ask for it at once
        with open(1, "w", encoding="utf-8", closefd=False) as out, contextlib.redirect_stdout(out):
            try:
                with mock.patch.object(torch.cuda, "is_available", return_value=False):
                    run()
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
    os._exit(code)


def finish(child: int, within: float) -> int | None:
    """The exit code of a process, or None where it had to be killed after `within` seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGKILL else code  # it may have ended by itself just before


def run_forks(runs: Iterable[Callable[[], None]], within: float) -> list[str]:
    """What each `run()` prints in a fork of its own, all of them at the same time.

    AssertionError with the output of all where one failed, or where `within` seconds are over.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = {Path(folder, str(number)): run for number, run in enumerate(runs)}
        children = {log: start(run, log) for log, run in children.items()}
        end = time.monotonic() + within
        codes = [finish(child, end - time.monotonic()) for child in children.values()]
        outputs = [log.read_text(encoding="utf-8") for log in children]
    assert set(codes) == {0}, "\n".join([f"exit codes {codes}, where None had no end after {within} s", *outputs])
    return outputs
