"""Training: a data set is one entry of one table; who prepares its batches, and where they are kept."""

import datetime
import re

import datasets
import pytest
import tiny_data
import torch

from u2a_fast import U2A, options
from u2a_fast.card import data_hash
from u2a_fast.data import load_table
from u2a_fast.methods import LateFusion
from u2a_fast.runs import check_directory, claim_directory
from u2a_fast.training import make_trainer, run_trainer, train, training_split, workers_for

NAMES = ("image", "text")


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


@pytest.mark.slow
def test_trainer_gets_workers_and_data_cache(data, tmp_path):
    asked = options.TrainOptions(data="squares", data_cache=str(tmp_path / "cache"), num_workers=1, batch_size=4)
    trainer = make_trainer(U2A, asked, *data, tmp_path / "out")
    assert trainer.args.dataloader_num_workers == 1
    pictures = sum(int(batch["modality_mask"][:, 1].sum()) for batch in trainer.get_train_dataloader())
    assert 0 < len(list((tmp_path / "cache").rglob("*.safetensors"))) <= pictures


@pytest.mark.slow
def test_the_bar_shows_the_loss(data, tmp_path, capsys):
    asked = options.TrainOptions(data="squares", max_steps=10, batch_size=4)
    make_trainer(U2A, asked, *data, tmp_path / "out").train()
    shown = capsys.readouterr()
    assert re.search(r"10/10 .*loss \d+\.\d{3}", shown.err)
    assert "learning_rate" not in shown.out + shown.err


def trained(data, folder, **asked):
    """The model after a few steps, and their losses."""
    asked |= {"batch_size": 8, "max_steps": 9, "modality_dropout": 0.0, "num_workers": 0}
    trainer = make_trainer(U2A, options.TrainOptions(data="squares", **asked), *data, folder)
    trainer.args.logging_steps = 1
    model = run_trainer(trainer)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_in_graphs_is_training(data, tmp_path, device):
    if device.type == "cpu":
        with pytest.raises(ValueError, match="a CUDA graph needs the model on a GPU"):
            trained(data, tmp_path / "refused", capture=True)
        return
    _, expected = trained(data, tmp_path / "eager", dtype="float32")
    model, losses = trained(data, tmp_path / "captured", dtype="float32", capture=True)
    assert sum(step.replays for step in model._steps.steps.values()) == len(losses) == 9
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_captured_is_refused_before_anything_is_written(data, tmp_path):
    splits, encoders = data
    asked = options.TrainOptions(method="pmf", encoders=encoders, output_dir=str(tmp_path / "out"), capture=True)
    with pytest.raises(ValueError, match="PMF runs depend on values"):
        train(asked, splits)
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.slow
def test_what_diverged_is_not_saved(data, tmp_path):
    asked = options.TrainOptions(
        data="squares", epochs=1, batch_size=4, learning_rate=1e30, head_learning_rate=1e30, dtype="float32"
    )
    with pytest.raises(
        ValueError, match=r"training diverged: \S+ hold values that are not finite: lower --learning-rate"
    ):
        run_trainer(make_trainer(U2A, asked, *data, tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_cache_that_cannot_be_a_folder_is_refused_before_training(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: a cache needs a folder"):
        make_trainer(U2A, options.TrainOptions(data_cache=str(tmp_path / "file")), *data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"data_cache": "elsewhere"}, {"num_workers": 1}])
def test_a_run_goes_on_with_another_cache_and_other_workers(changed, tmp_path):
    claim_directory(options.TrainOptions(output_dir=str(tmp_path)))
    check_directory(options.TrainOptions(output_dir=str(tmp_path), resume=True, **changed))


# ------------------------------------------------------------------------------------------- data from other places
@pytest.mark.slow
def test_columns_that_nobody_learns_from_neither_end_a_run_nor_enter_its_hash(data, tmp_path):
    plain, encoders = data
    others = {"day": datetime.date(2026, 1, 1), "blob": b"\0", "record": {"a": 1}}
    splits = datasets.DatasetDict(plain)
    for name, cell in others.items():
        splits = datasets.DatasetDict({k: part.add_column(name, [cell] * len(part)) for k, part in splits.items()})
    asked = options.TrainOptions(data="mine", encoders=encoders, max_steps=1, output_dir=str(tmp_path))
    train(asked, splits)
    hashed = data_hash(training_split(asked, plain), NAMES)
    assert hashed in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert hashed == data_hash(training_split(asked, splits).with_format("numpy"), NAMES)


def test_the_hash_of_a_usual_table_stays(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,group\nred,x,1\nblue,y,\n")
    rows = [row for part in load_table(tmp_path / "a.csv").values() for row in part]
    said = "364dd4353c8b7b817f5f3f4bbeaf8efe0ddda58f945f460895504031eca6b7ec"
    assert data_hash(sorted(rows, key=lambda row: row["label"]), ["text"]) == said


def numbers(part):
    return part.cast_column("label", datasets.Value("float32"))


@pytest.mark.parametrize(
    ("changed", "modalities", "message"),
    [
        (lambda part: datasets.IterableDataset.from_generator(lambda: iter(part)), NAMES, "has no features, which say"),
        (lambda part: numbers(part).to_iterable_dataset(), NAMES, "whose scale a stream does not tell: load it as a"),
        (lambda part: part.to_iterable_dataset(), ["text"], "is a stream with one modality, and holes are drawn for"),
    ],
    ids=["no features", "numbers", "one modality"],
)
def test_a_stream_that_cannot_be_trained_on_is_refused_in_a_sentence(changed, modalities, message, data, tmp_path):
    plain, encoders = data
    splits = {name: changed(plain[name].select_columns([*modalities, "label"])) for name in ("train", "test")}
    chosen = {name: encoders[name] for name in modalities}
    asked = {"data": "mine", "encoders": chosen, "method": "late_fusion", "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        train(options.TrainOptions(**asked, output_dir=str(tmp_path / "out")), splits)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("named", [{}, {"data": "mmimdb:/films"}, {"data": "mine"}])
def test_splits_that_are_given_are_ones_own_data(named, data, tmp_path, capsys):
    plain, encoders = data
    asked = options.TrainOptions(**named, encoders=encoders, max_steps=1, output_dir=str(tmp_path))
    train(asked, plain)
    out = capsys.readouterr().out
    assert "Chosen for this data: --missing-rate 0.0 " in out and "\nLabels: 3 classes: blue, green, red.\n" in out
    run, card = ((tmp_path / name).read_text(encoding="utf-8") for name in ("run.yaml", "README.md"))
    name = "mine" if named == {"data": "mine"} else "own data"
    assert f"data: {name}\n" in run and f"data: {name}\n" in card and f"name: {name}\n" in card
    with pytest.raises(ValueError, match="holds this run already"):
        train(asked, plain)


@pytest.mark.parametrize("metric", [None, "accuracy"])
@pytest.mark.parametrize("streams", [["train"], ["validation"], ["train", "validation"], []])
def test_a_validation_split_may_lack_a_modality_and_be_of_another_kind_than_the_train_split(
    streams, metric, data, tmp_path
):
    plain, encoders = data
    given = {**plain, "validation": plain["validation"].remove_columns("image")}
    given["train"] = given["train"].cast_column("image", datasets.Image())  # as others make them
    given |= {name: given[name].to_iterable_dataset() for name in streams}
    asked = options.TrainOptions(
        data="mine", max_steps=1, metric_for_best=metric, method="late_fusion", missing_rate=0.5, batch_size=4
    )
    if streams == ["validation"] and metric is None:
        with pytest.raises(ValueError, match="the validation split of mine is a stream and the train split is none"):
            make_trainer(LateFusion, asked, given, encoders, tmp_path)
        return
    trainer = make_trainer(LateFusion, asked, given, encoders, tmp_path)
    held = list(trainer.train_dataset if metric is None else trainer.eval_dataset)
    assert len(held) == len(plain["validation"]) + (len(plain["train"]) if metric is None else 0)
    assert all(sample.get("image") is None for sample in held[-len(plain["validation"]) :])


def test_a_validation_split_that_measures_nothing_is_refused(data, tmp_path):
    plain, encoders = data
    asked = options.TrainOptions(data="mine", metric_for_best="accuracy")
    for part in (plain["validation"].remove_columns("image"), plain["validation"].map(lambda row: {"image": None})):
        with pytest.raises(ValueError, match="the validation split of mine has no row with image, by which"):
            make_trainer(LateFusion, asked, {**plain, "validation": part}, {"image": encoders["image"]}, tmp_path)


def test_a_class_that_is_not_trained_is_refused_before_training(data, tmp_path):
    plain, encoders = data
    wider = plain["test"].cast_column("label", datasets.ClassLabel(names=["blue", "green", "red", "zebra"]))
    asked = options.TrainOptions(data="mine", encoders=encoders, max_steps=1, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="the test split of mine has a class 'zebra', and the train split only blue"):
        train(asked, {**plain, "test": wider})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{"task": "regression"}, {"columns": {"text": "title"}}, {"label_separator": "|"}])
def test_what_says_how_a_table_is_read_says_nothing_of_splits(given, data):
    with pytest.raises(ValueError, match="says how a table is read, and own data is none: leave it out"):
        train(options.TrainOptions(**given), data[0])


def test_splits_that_are_not_there_are_named(data):
    with pytest.raises(ValueError, match="mine has no train split, only test: put all rows into one table"):
        train(options.TrainOptions(data="mine"), {"test": data[0]["test"]})


# ---------------------------------------------------------------------------------------------------------- measures
@pytest.mark.slow
def test_a_baseline_with_nothing_to_learn_from_is_left_out(data, tmp_path, caplog):
    plain, encoders = data
    splits = {name: part.filter(lambda row: row["text"] and row["image"]) for name, part in plain.items()}
    asked = {"data": "mine", "encoders": encoders, "max_steps": 1, "output_dir": str(tmp_path)}
    rows = train(options.TrainOptions(**asked, missing_rate=1.0, missing_kind="image", baselines=True), splits)
    assert {row["scenario"] for row in rows if "[unimodal]" in row["scenario"]} == {"text only [unimodal]"}
    said = "no model of image only is trained on what remains of it: the train split of mine has no rows"
    assert any(message.startswith(said) for message in caplog.messages)


def test_numbers_are_watched_in_their_own_units(data, tmp_path):
    plain, encoders = data
    splits = {name: numbers(part).map(lambda row: {"label": 1000 + 50 * row["label"]}) for name, part in plain.items()}
    asked = options.TrainOptions(data="mine", max_steps=1, metric_for_best="mae")
    trainer = make_trainer(U2A, asked, splits, encoders, tmp_path / "out")
    said = trainer.predict(trainer.eval_dataset)
    scale = trainer.data_collator
    assert scale.deviation > 20
    error = (torch.from_numpy(said.predictions) - torch.from_numpy(said.label_ids)).abs().mean() * scale.deviation
    assert said.metrics["test_mae"] == pytest.approx(error.item(), rel=1e-4)


def test_rows_that_are_in_no_split_are_refused():
    with pytest.raises(TypeError, match=r"splits are .* not a list: name each"):
        train(options.TrainOptions(), [{"text": "a", "label": 0}])
