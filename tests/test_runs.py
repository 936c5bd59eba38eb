"""What a folder says of the run that made it."""

from dataclasses import replace

import pytest

from u2a_fast.options import Recipe, TrainOptions, settled
from u2a_fast.runs import RUN_FILE, as_begun, check_directory, claim_directory, data_of, seed_of


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


@pytest.mark.parametrize("split", [False, True])
def test_a_run_goes_on_with_the_table_that_it_began_with(tmp_path, split):
    table = tmp_path / "data" / "train.csv"
    table.parent.mkdir()
    table.write_text("text,label\na,x\nb,y\n")
    data = str(table.parent if split else table)
    asked = TrainOptions(data=data, output_dir=str(tmp_path / "out"), resume=True)
    claim_directory(asked)
    (tmp_path / "out" / "checkpoint-4").mkdir()
    assert check_directory(asked) is None and data_of(tmp_path / "out" / "checkpoint-4") is not None
    table.write_text("text,label\nb,y\na,x\n")
    with pytest.raises(ValueError, match=r"has changed since the run in .*out began"):
        check_directory(asked)
    (tmp_path / "out" / "data.sha256").unlink()  # as folders of earlier versions
    assert check_directory(asked) is None


def test_data_known_by_name_does_not_change(tmp_path):
    claim_directory(TrainOptions(output_dir=str(tmp_path)))
    assert data_of(tmp_path) is None


def test_a_folder_is_claimed_by_one_run(tmp_path):
    asked = TrainOptions(output_dir=str(tmp_path))
    assert check_directory(asked) is None and check_directory(asked) is None  # of two processes
    claim_directory(asked)
    with pytest.raises(ValueError, match="another process has begun a run in"):
        claim_directory(asked)


def test_a_run_goes_on_with_the_recipe_that_it_began_with(tmp_path, monkeypatch):
    splits = {"train": [{"text": "red"}] * 700}
    asked = TrainOptions(data="mine", epochs=2, output_dir=str(tmp_path), resume=True)
    begun = settled(as_begun(asked), splits)
    claim_directory(asked, begun)
    later = Recipe(epochs=99, batch_size=99, translators=False, separate_heads=True)
    monkeypatch.setattr("u2a_fast.options.recipe_for", lambda options, splits: later)
    assert check_directory(asked) is None and settled(as_begun(asked), splits) == begun
    elsewhere = replace(asked, output_dir=str(tmp_path / "another"))
    assert settled(as_begun(elsewhere), splits).batch_size == 99


def test_folders_of_earlier_versions_do_not_say_their_recipe(tmp_path):
    asked = TrainOptions(output_dir=str(tmp_path), resume=True)
    claim_directory(asked)
    assert as_begun(asked) == asked


@pytest.mark.parametrize("content", ["", "# nothing\n", "- a\n", "a: [\n"])
def test_what_holds_no_options_of_a_run_is_refused(content, tmp_path):
    (tmp_path / RUN_FILE).write_text(content)
    for look in (seed_of, lambda folder: check_directory(TrainOptions(output_dir=str(folder)))):
        with pytest.raises(ValueError, match=r"run\.yaml (holds no options of a run|is no YAML that can be read)"):
            look(tmp_path)


@pytest.mark.parametrize("inside", ["mine", "out/mine"])
def test_options_that_somebody_keeps_above_a_model_are_not_its_own(inside, tmp_path):
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / RUN_FILE).write_text("seed: 3\n")
    assert seed_of(tmp_path / inside) == 0
