"""Malformed files, tables, labels, lines and models, each drawn from its number, and what the product may do with them.

`python tests/support/fuzz.py 10000` tries that many and prints what happened; the suite tries a few hundred. A case may
end well or be refused by a ValueError, TypeError or OSError of one sentence; it may not take 5 s, nor 1 GiB, nor leave
a part of an output behind, nor use the network, a pickle or the keyboard, nor write beside its own folder.
"""

import builtins
import logging
import os
import pickle
import random
import resource
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import fuzz_models
import torch
import transformers
from fuzz_models import World, world
from malformed import cell, clip, comma_table, json_lines, parquet_table, picture

from u2a_fast.data import load_table
from u2a_fast.data.inputs import to_audio, to_image
from u2a_fast.data.labels import settle_labels
from u2a_fast.prediction import predict_answers, samples_from, write_answers

STEMS = ("t", "t", "train", "train", "val", "train-00000-of-00001", "train-00000-of-00002")
SECONDS, KIBIBYTES = 5.0, 2**20
FORBIDDEN = (
    *((socket.socket, "connect"), (socket, "getaddrinfo"), (builtins, "input"), (torch, "load")),
    *((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")),
)


class Broken(AssertionError):
    """The product did what it must not do."""


# --------------------------------------------------------------------------------------------------------------- cases
def try_picture(draw: random.Random, folder: Path, given: World) -> None:
    to_image(picture(draw))


def try_clip(draw: random.Random, folder: Path, given: World) -> None:
    to_audio(clip(draw), 16_000)


def try_labels(draw: random.Random, folder: Path, given: World) -> None:
    rows = [{"place": f"row {i}", "label": cell(draw)} for i in range(draw.randint(1, 6))]
    settle_labels(rows, draw.choice((None, "classification", "multi_label", "regression")), draw.choice((None, "|")))


def table_file(draw: random.Random, folder: Path) -> Path:
    write, suffix = draw.choice(((json_lines, "jsonl"), (comma_table, "csv"), (parquet_table, "parquet")))
    path = folder / f"{draw.choice(STEMS)}.{suffix}"
    path.write_bytes(write(draw))
    (folder / "a.png").write_bytes(picture(draw))
    (folder / "a.wav").write_bytes(clip(draw))
    return path


def try_table(draw: random.Random, folder: Path, given: World) -> None:
    path = table_file(draw, folder)
    load_table(draw.choice((path, folder)), decode=draw.random() < 0.7, label_separator=draw.choice((None, "|")))


def try_prediction(draw: random.Random, folder: Path, given: World) -> None:
    path, output = table_file(draw, folder), folder / "out" / draw.choice(("a.csv", "a.jsonl"))
    output.parent.mkdir()
    try:
        samples = samples_from(str(path))
        write_answers(predict_answers(given.model, samples), str(output))
    except BaseException:
        if list(output.parent.iterdir()):
            raise Broken(f"a part of {output.name} was left behind") from None
        raise
    if not output.read_text(encoding="utf-8").endswith("\n") and samples:
        raise Broken("the output is cut short")


CASES = (try_picture, try_clip, try_labels, try_table, try_prediction, *fuzz_models.CASES)


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Within it nothing is asked for over the network, unpickled or typed, and no file is written beside `folder`."""
    used: list[str] = []

    def refuse(name: str):
        def call(*args, **kwargs):
            used.append(name)
            raise OSError(f"{name} was called")

        return call

    before = files_beside(folder)
    with ExitStack() as stack:
        for owner, name in FORBIDDEN:
            stack.enter_context(mock.patch.object(owner, name, refuse(name)))
        try:
            yield
        finally:
            if used:
                raise Broken(f"{used[0]} was called")
            if before != files_beside(folder):
                raise Broken("a file was written")


def files_beside(folder: Path) -> set[tuple[str, int]]:
    """Every file beside `folder`, with the time it was written."""
    around = (Path(name) / file for name, _, files in os.walk(folder.parent) for file in files)
    return {(str(path), path.stat().st_mtime_ns) for path in around if folder not in path.parents}


def attempt(number: int, given: World) -> str:
    """Try case `number`: `"fine"` or `"refused"`; raises Broken with the case otherwise."""
    draw = random.Random(number)
    case = CASES[number % len(CASES)]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    outcome = "fine"
    with tempfile.TemporaryDirectory(dir=given.saved.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with guarded(Path(folder)):
                case(draw, Path(folder), given)
        except (ValueError, TypeError, OSError) as error:
            outcome = "refused"
            if not str(error) or len(str(error).splitlines()) > 1 or type(error) is UnicodeDecodeError:
                raise Broken(f"case {number} ({case.__name__}) is refused by {error!r}") from error
        except Exception as error:
            raise Broken(f"case {number} ({case.__name__}) ends in {error!r}") from error
    seconds = time.monotonic() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if seconds > SECONDS or grown > KIBIBYTES:
        raise Broken(f"case {number} ({case.__name__}) took {seconds:.1f} s and {grown / 1024:.0f} MiB")
    return outcome


def main(count: int) -> None:
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        given = world(Path(folder))
        start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            try:
                outcomes[f"{CASES[number % len(CASES)].__name__} {attempt(number, given)}"] += 1
            except Broken as error:
                outcomes["broken"] += 1
                print(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{count} cases in {time.monotonic() - start:.0f} s, {grown:.0f} MiB more at the peak: {dict(outcomes)}")
    sys.exit(1 if outcomes["broken"] else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
