"""`make chaos`: runs that are killed at random points, again and again, and end as an undisturbed run ends.

A fork of this process trains, so that a start costs no imports, and is sent SIGKILL after a random part of the time
that the undisturbed run took. It is then resumed, and killed again, until it is through: its weights, its losses and
its report have to be those of the run that nobody disturbed, bit for bit.
"""

import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import forks
import tiny_data
import torch
from forks import finish
from transformers import TrainingArguments

from u2a_fast import training
from u2a_fast.cli import main

METHODS = ("u2a", "pmf")
KILLS_A_RUN = 4  # at most: then it may come to its end


def arguments(root: Path, method: str) -> list[str]:
    """A run that trains, saves every other step, and caches: pictures always, features where the method has them."""
    caches = ["--data-cache", str(root / "pictures")]
    caches += ["--feature-cache", str(root / "features")] if method == "pmf" else []
    recipe = ["--max-steps", "12", "--save-steps", "2", "--batch-size", "4", "--lora-dropout", "0.1"]
    encoders = json.dumps({name: str(root / "encoders" / name) for name in ("text", "image")})
    data = ["--data", str(root / "data" / "table.csv"), "--encoders", encoders]
    return ["train", "--method", method, *data, *recipe, *caches]


def prepare(root: Path) -> None:
    tiny_data.write_table(root / "data", 40)
    tiny_data.encoder_folders(root)


def start(given: list[str], log: Path) -> int:
    """The id of a process that runs the command line with these arguments."""
    return forks.start(lambda: run(given), log)


def run(given: list[str]) -> None:
    training.TrainingArguments = every_loss
    training.fitting_batch = lambda batch_size: batch_size  # whatever memory a start finds free
    main(given)


def every_loss(*given: object, **options: object) -> TrainingArguments:
    """Trainer's arguments, but that each step's loss is logged: a mean over several is begun anew on resuming."""
    return TrainingArguments(*given, **{**options, "logging_steps": 1})


def outcome(folder: Path) -> dict[str, object]:
    """What a run comes to: trained bytes, losses, report."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {
        "losses": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        "weights": (folder / "model.safetensors").read_bytes(),
        "report": (folder / "report.csv").read_text(encoding="utf-8"),
    }


def undisturbed(root: Path, method: str) -> tuple[dict[str, object], float]:
    """What the run comes to, and how long it takes, without what earlier runs have cached."""
    folder, log, began = root / f"{method}-whole", root / "log", time.monotonic()
    code = finish(start([*arguments(root, method), "--output-dir", str(folder)], log), within=300)
    assert code == 0, log.read_text(encoding="utf-8")
    return outcome(folder), time.monotonic() - began


def disturbed(root: Path, method: str, kills: int, lasts: float, draw: random.Random) -> tuple[Path, list[str]]:
    """The folder of a run that was killed up to `kills` times, and what stood in it after each time."""
    for cache in ("pictures", "features"):
        shutil.rmtree(root / cache, ignore_errors=True)
    folder, log, left = root / f"{method}-killed", root / "log", []
    shutil.rmtree(folder, ignore_errors=True)
    while True:
        resume = ["--resume"] if (folder / "run.yaml").exists() else []
        within = draw.uniform(0, lasts) if len(left) < kills else 300
        code = finish(start([*arguments(root, method), "--output-dir", str(folder), *resume], log), within)
        if code is not None:
            assert code == 0, log.read_text(encoding="utf-8")
            return folder, left
        assert len(left) < kills, "a run that nobody killed did not end"
        left.append(f"after {within:.2f} s {' '.join(sorted(str(p.relative_to(folder)) for p in folder.rglob('*')))}")


def compare(whole: dict[str, object], folder: Path, left: list[str]) -> None:
    """AssertionError, with what is known of the kills, where a run came to something else."""
    found = outcome(folder)
    for name, value in whole.items():
        if found[name] != value:
            both = [] if isinstance(value, bytes) else [value, found[name]]
            raise AssertionError("\n".join([f"{name} differ", *map(str, both), *left]))


def chaos(kills: int, seed: int = 0) -> None:
    """Kill runs of two methods until `kills` are spent. AssertionError where one ends otherwise."""
    torch.set_num_threads(1)
    draw, spent = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        prepare(root)
        expected = {method: undisturbed(root, method) for method in METHODS}
        for method in itertools.cycle(METHODS):
            if spent == kills:
                return
            whole, lasts = expected[method]
            folder, left = disturbed(root, method, min(KILLS_A_RUN, kills - spent), lasts, draw)
            compare(whole, folder, left)
            spent += len(left)
            print(f"{method}: {len(left)} kills, {spent} of {kills}: as if nothing had happened", flush=True)


if __name__ == "__main__":
    chaos(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
