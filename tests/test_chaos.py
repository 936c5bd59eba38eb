"""A killed run goes on as if nothing had happened; a full disk costs what was being written, and nothing before it."""

import json
import os
import resource
import sys
from pathlib import Path

import chaos
import pytest
from forks import run_forks
from transformers import Trainer

from u2a_fast import cli, training
from u2a_fast.options import TrainOptions
from u2a_fast.runs import RUN_FILE, check_directory, claim_directory


@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_they_had_not_been():
    """`make chaos` kills fifty times."""
    (said,) = run_forks([lambda: chaos.chaos(5, seed=1)], within=480)
    assert "5 of 5" in said


def test_how_a_run_ended_before_it_could_be_killed_is_told():
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", "raise SystemExit(3)"], os.environ)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert chaos.finish(child, within=0) == 3


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """Files end at 30 kB, in the middle of the weights, or at 100 kB, in the middle of the optimizer's state."""
    chaos.prepare(tmp_path)
    run_forks([lambda: fill_disks(tmp_path, chaos.arguments(tmp_path, "u2a"))], within=480)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found == {"30000": [["checkpoint-2"], True], "100000": [["checkpoint-2"], True]}


def test_a_run_is_claimed_whole_or_not_at_all(tmp_path, monkeypatch):
    asked = TrainOptions(output_dir=str(tmp_path))

    def full(path, *given, **options):
        path.touch()
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            claim_directory(asked)
    assert not (tmp_path / RUN_FILE).exists()
    assert check_directory(asked) is None
    claim_directory(asked)
    with pytest.raises(ValueError, match="holds this run already"):
        check_directory(asked)


def test_a_checkpoint_whose_state_was_cut_short_is_passed_over(tmp_path):
    asked = TrainOptions(output_dir=str(tmp_path), resume=True)
    claim_directory(asked)
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_step": 4'), (6, "")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert check_directory(asked) == str(tmp_path / "checkpoint-2")


def test_a_run_goes_on_with_as_many_samples_at_once_as_before(tmp_path, monkeypatch):
    """Memory that is short halves the batch; parts are summed in another order, and have other pairs to align."""
    asked = TrainOptions(batch_size=16)
    monkeypatch.setattr(training, "fitting_batch", lambda batch_size: 4)
    assert at_once(asked, tmp_path) == (4, 4)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "train_batch_size": 8}')
    assert at_once(asked, tmp_path) == (8, 2)
    assert at_once(TrainOptions(batch_size=12), tmp_path) == (4, 3)  # of a share that it does not divide


def at_once(options, folder):
    arguments = training.training_arguments(options, folder, workers=0)
    return arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps


def test_checkpoints_between_epochs_do_not_go_with_the_best_epoch():
    with pytest.raises(ValueError, match="leave --save-steps out"):
        TrainOptions(save_steps=5, metric_for_best="accuracy")


def run_until_full(limit, given):
    """The command line on a disk where, from the second checkpoint on, no file gets beyond `limit` bytes."""
    save = Trainer._save_checkpoint

    def save_less(self, *args, **kwargs):
        if self.state.global_step > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        save(self, *args, **kwargs)

    Trainer._save_checkpoint = save_less
    try:
        cli.main(given)
    except SystemExit as error:  # safetensors says that it cannot write, and torch in its own way
        return str(error)
    finally:
        Trainer._save_checkpoint = save
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    raise AssertionError("nothing was too large for the disk")


def fill_disks(root, given):
    """`{limit: [checkpoints that a resumed run takes for whole, whether it then ends as an undisturbed one]}`."""
    cli.main([*given, "--output-dir", str(root / "whole")])
    found = {}
    for limit in (30_000, 100_000):
        folder = root / str(limit)
        said = run_until_full(limit, [*given, "--output-dir", str(folder)])
        assert any(words in said for words in ("too large", "write failed", "unexpected pos")), said
        whole = [path.parent.name for path in folder.glob("checkpoint-*/trainer_state.json")]
        cli.main([*given, "--output-dir", str(folder), "--resume"])
        found[limit] = whole, chaos.outcome(folder)["weights"] == chaos.outcome(root / "whole")["weights"]
    (root / "found.json").write_text(json.dumps(found), encoding="utf-8")
