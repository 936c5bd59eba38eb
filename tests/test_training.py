"""Training: a data set is one entry of one table; who prepares its batches, and where they are kept."""

import re

import pytest
import tiny_data
import torch

from u2a_fast import U2A, options
from u2a_fast.data import load_table
from u2a_fast.runs import check_directory, claim_directory
from u2a_fast.training import make_trainer, workers_for


def test_a_data_set_is_one_entry(monkeypatch):
    entry = options.BuiltinData(lambda seed: {"train": seed}, options.Recipe(image_size=8))
    monkeypatch.setitem(options.DATASETS, "toy", entry)
    asked = options.TrainOptions(data="toy", seed=3)
    assert options.DATASETS["toy"].load(seed=3) == {"train": 3}
    assert options.settled(asked, {"train": None}).image_size == 8


@pytest.mark.parametrize(
    ("gpu", "asked", "pool", "expected"),
    [
        (False, None, [], 0),
        (True, None, [], 2),
        (True, None, iter([]), 0),  # a stream
        (True, 0, [], 0),
        (False, 3, [], 3),
        (False, 1, iter([]), 1),
    ],
)
def test_workers_are_as_asked_or_follow_the_machine(gpu, asked, pool, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert workers_for(options.TrainOptions(num_workers=asked), pool) == expected


def test_fewer_than_no_workers_are_refused():
    with pytest.raises(ValueError, match="--num-workers must be 0 or more, not -1"):
        options.TrainOptions(num_workers=-1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Splits of coloured squares, and the folders of tiny encoders."""
    root = tmp_path_factory.mktemp("training")
    return load_table(tiny_data.write_table(root / "data", 30)), tiny_data.encoder_folders(root)


def test_trainer_gets_workers_and_data_cache(data, tmp_path):
    asked = options.TrainOptions(data="squares", data_cache=str(tmp_path / "cache"), num_workers=1, batch_size=4)
    trainer = make_trainer(U2A, asked, *data, tmp_path / "out")
    assert trainer.args.dataloader_num_workers == 1
    pictures = sum(int(batch["modality_mask"][:, 1].sum()) for batch in trainer.get_train_dataloader())
    assert 0 < len(list((tmp_path / "cache").rglob("*.safetensors"))) <= pictures


def test_the_bar_shows_the_loss(data, tmp_path, capsys):
    asked = options.TrainOptions(data="squares", max_steps=10, batch_size=4)
    make_trainer(U2A, asked, *data, tmp_path / "out").train()
    shown = capsys.readouterr()
    assert re.search(r"10/10 .*loss \d+\.\d{3}", shown.err)
    assert "learning_rate" not in shown.out + shown.err


def test_a_cache_that_cannot_be_a_folder_is_refused_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: a cache needs a folder"):
        make_trainer(U2A, options.TrainOptions(data_cache=str(tmp_path / "file")), *data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"data_cache": "elsewhere"}, {"num_workers": 1}])
def test_a_run_goes_on_with_another_cache_and_other_workers(changed, tmp_path):
    claim_directory(options.TrainOptions(output_dir=str(tmp_path)))
    check_directory(options.TrainOptions(output_dir=str(tmp_path), resume=True, **changed))
