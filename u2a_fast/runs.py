"""The folder of a run: what it may hold, and where to go on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from .data.splits import MODALITIES
from .options import TrainOptions, data_digest, recipe_of, unsettled
from .tensor_files import check_folder

RUN_FILE = "run.yaml"
CHOSEN = "chosen"  # in it, the recipe of what was not asked for
BESIDE = "baselines"  # in it, the folders of models beside the run's own
DATA_FILE = "data.sha256"  # of the tables that the rows were split out of
# Bear on nothing that comes out.
ELSEWHERE = ("output_dir", "resume", "data_cache", "num_workers", "capture", "save_steps")
LEFT_BY_OTHERS = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "checkpoint-*")


def check_directory(options: TrainOptions) -> str | None:
    """Refuse a directory that holds something else; the checkpoint to resume from, if that was asked for."""
    folder = Path(options.output_dir)
    check_folder(folder, "a run")
    if (folder / RUN_FILE).exists():
        before, asked = read_run(folder / RUN_FILE), _run(options)
        changed = sorted(name for name in asked if before.get(name) != asked[name])
        if changed:
            raise ValueError(f"{folder} holds another run ({', '.join(changed)} differ): choose another output_dir")
        if not options.resume:
            raise ValueError(f"{folder} holds this run already: pass --resume to go on, or choose another output_dir")
        now = data_digest(options.data)
        if now is not None and data_of(folder) not in (None, now):
            raise ValueError(
                f"{options.data} has changed since the run in {folder} began, and its split with it: choose another "
                "output_dir"
            )
        return _last_checkpoint(folder)
    found = sorted(path.name for pattern in LEFT_BY_OTHERS for path in folder.glob(pattern))
    if found:
        raise ValueError(f"{folder} holds another model ({found[0]}): choose another output_dir")
    return None


def refuse_model(output_dir: str) -> None:
    """ValueError where a model lies in the folder of an evaluation, whose own report and tallies would be replaced."""
    found = next((name for name in (RUN_FILE, "config.json") if (Path(output_dir) / name).exists()), None)
    if found:
        raise ValueError(
            f"{output_dir} holds a model ({found}) and perhaps its report, which would be replaced: choose another "
            "--output-dir"
        )


def split_before(folder: Path) -> int | None:
    """How many samples each process took at once in the run that is to go on; None where there is none."""
    return max(_whole_checkpoints(folder), default=(0, "", None))[2]


def _last_checkpoint(folder: Path) -> str | None:
    return max(_whole_checkpoints(folder), default=(0, None))[1]


def _whole_checkpoints(folder: Path) -> Iterator[tuple[int, str, int | None]]:
    """Step, folder and samples at once: Trainer writes its state last, and a killed run may have got less far."""
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(json.JSONDecodeError):
            state = json.loads(path.read_text(encoding="utf-8"))
            yield state["global_step"], str(path.parent), state.get("train_batch_size")


def claim_directory(options: TrainOptions, chosen: TrainOptions | None = None) -> None:
    """Say which run a folder holds, and what was chosen for it where the options say nothing.

    Raises:
        ValueError: another process has begun one there since `check_directory` looked.
    """
    folder = Path(options.output_dir)
    if not options.resume and (folder / RUN_FILE).exists():
        raise ValueError(f"another process has begun a run in {folder} just now: choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if digest := data_digest(options.data):
        write_whole(folder / DATA_FILE, digest + "\n")
    found = _run(options) if chosen is None else _run(options) | {CHOSEN: recipe_of(chosen)}
    write_whole(folder / RUN_FILE, yaml.safe_dump(found, sort_keys=False))


def as_begun(options: TrainOptions) -> TrainOptions:
    """The options with what was chosen when the run of their folder began: another version might choose otherwise."""
    file = Path(options.output_dir) / RUN_FILE
    chosen = read_run(file).get(CHOSEN, {}) if file.exists() else {}
    return replace(options, **{name: chosen[name] for name in unsettled(options) if name in chosen})


def seed_of(folder: str | Path) -> int:
    """The seed of the run whose model, baseline or checkpoint lies in a folder; 0 where there is no run.

    By it were the rows chosen that the model has seen.
    """
    return run_of(folder).get("seed", 0)


def run_of(folder: str | Path) -> dict[str, Any]:
    """The options of the run that a folder belongs to; none where there is no run."""
    file = _file_of(folder, RUN_FILE)
    return {} if file is None else read_run(file)


def read_run(file: Path) -> dict[str, Any]:
    """The options in a file that `claim_directory` wrote; ValueError where it holds something else."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML that can be read: restore it, or choose another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no options of a run: restore it, or choose another folder")
    return found


def modalities_of(folder: str | Path) -> tuple[str, ...]:
    """What the model of a folder reads; all that tables have where it does not say, as a name on the hub does not."""
    try:
        return tuple(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["modalities"])
    except (OSError, ValueError, KeyError, TypeError):  # whatever is wrong with it, loading the model tells
        return MODALITIES


def data_of(folder: str | Path) -> str | None:
    """The digest of the table that the run of a folder was given; None where none is known."""
    file = _file_of(folder, DATA_FILE)
    return None if file is None else file.read_text(encoding="utf-8").strip()


def _file_of(folder: str | Path, name: str) -> Path | None:
    """The file of the run that a model, baseline or checkpoint belongs to."""
    own = Path(folder).resolve()
    if not own.exists():  # a name on the hub
        return None
    above = [own.parent] if own.name.startswith("checkpoint-") else []
    above += [place.parent for place in own.parents[:2] if place.name == BESIDE]
    return next((place / name for place in (own, *above) if (place / name).exists()), None)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, should the process die or the disk be full."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)


def _run(options: TrainOptions) -> dict[str, Any]:
    """What makes two runs the same run: every option that bears on what comes out."""
    return {name: value for name, value in asdict(options).items() if name not in ELSEWHERE}
