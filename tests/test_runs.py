"""What a folder says of the run that made it."""

import pytest

from u2a_fast.runs import RUN_FILE, seed_of


@pytest.mark.parametrize("inside", ["", "checkpoint-4", "baselines/late_fusion"])
def test_models_of_a_run_have_its_seed(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / RUN_FILE).write_text("seed: 3\n")
    assert seed_of(folder) == 3


def test_what_is_no_run_has_seed_0(tmp_path, monkeypatch):
    (tmp_path / RUN_FILE).write_text("seed: 3\n")
    monkeypatch.chdir(tmp_path)
    assert seed_of("somebody/a-model") == 0  # on the hub
    (tmp_path / RUN_FILE).unlink()
    assert seed_of(tmp_path) == 0
