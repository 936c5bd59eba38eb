"""Every task through the command line: from a table of a stranger to a report, a card and answers."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest
import tiny_data
import torch
import yaml

from u2a_fast import load_model
from u2a_fast.cli import main
from u2a_fast.data import load_table
from u2a_fast.evaluation import evaluate
from u2a_fast.losses import StandardLabels
from u2a_fast.options import TrainOptions, choices, picture_size, settled
from u2a_fast.training import fitting_batch, train

LABELS = {
    "classes": lambda i, colour: colour,
    "two": lambda i, colour: str(i % 3 == 0),
    "several": lambda i, colour: "/".join([colour] + ["odd"] * (i % 2)),
    "numbers": lambda i, colour: f"{1000 + 50 * (i % 3)}.5",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    samples, colours = tiny_data.samples(60), list(tiny_data.COLOURS)
    for i, sample in enumerate(samples):
        sample["image"].save(root / f"{i}.png")
    for name, label in LABELS.items():
        with open(root / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow([" Image", "Title", "LABEL "])
            for i, sample in enumerate(samples):
                writer.writerow([f"{i}.png", sample["text"], label(i, colours[sample["label"]])])
    return root


@pytest.fixture(scope="module")
def encoders(root):
    return tiny_data.encoder_folders(root)


@pytest.fixture(scope="module")
def run(root, encoders):
    def run(name, *more, steps=3, folder=None):
        output = root / "out" / (folder or name)
        given = ["--encoders", json.dumps(encoders), "--max-steps", str(steps), "--output-dir", str(output)]
        main(["train", "--data", str(root / f"{name}.csv"), *given, *more])
        return output

    return run


def report(folder):
    with open(folder / "report.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predict(folder, root, capsys, *more):
    (root / "input.csv").write_text("text;image\nred square;0.png\nblue square;\n;nothing.png\n")
    capsys.readouterr()
    main(["predict", "--model", str(folder), "--input", str(root / "input.csv"), *more])
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "columns"),
    [
        ("two", ["--class-weights", "balanced"], ["accuracy", "macro_f1", "auroc"]),
        (
            "several",
            ["--label-separator", "/", "--class-weights", "balanced"],
            ["micro_f1", "macro_f1", "map", "accuracy"],
        ),
        ("numbers", ["--baselines"], ["mae", "rmse", "r2"]),
    ],
)
def test_each_task_is_trained_reported_and_answered(name, more, columns, run, root, capsys):
    folder = run(name, *more)
    out = capsys.readouterr().out
    assert "majority" in out and ("Chosen for this data: --missing-rate 0.0 " in out)
    rows = report(folder)
    assert list(rows[0]) == ["scenario", *columns, "n"] and rows[0]["scenario"] == "full"
    model = load_model(folder)
    (folder / "again").mkdir()
    separator = more[:2] if "--label-separator" in more else []
    repeated = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0])
    assert repeated["label_separator"] == ("/" if separator else None) and repeated["data"] == f"{name}.csv"
    main(["evaluate", "--model", str(folder), "--data", str(root / f"{name}.csv"), *separator,
          "--output-dir", str(folder / "again")])  # fmt: skip
    assert report(folder / "again") == [row for row in rows if "[" not in row["scenario"]]
    answers = [json.loads(line) for line in predict(folder, root, capsys).splitlines()]
    assert answers[2] == {}
    if name == "two":
        assert set(answers[0]) == {"label", "probability", "top"} and len(answers[0]["top"]) == 2
        assert sum(one["probability"] for one in answers[0]["top"]) == pytest.approx(1, abs=1e-3)
    elif name == "several":
        assert model.config.id2label == {0: "blue", 1: "green", 2: "odd", 3: "red"}
        assert set(answers[1]["probabilities"]) == set(model.config.id2label.values())
        assert set(answers[1]["labels"]) == {name for name, p in answers[1]["probabilities"].items() if p > 0.5}
    else:
        assert {row["scenario"] for row in rows} >= {"full [late fusion]", "text only [unimodal]"}
        assert all(900 < answer["value"] < 1200 for answer in answers[:2])
        (checkpoint,) = folder.glob("checkpoint-*")  # all that a killed run leaves
        samples = tiny_data.samples(4)
        torch.testing.assert_close(load_model(checkpoint).predict(samples), model.predict(samples))


@pytest.mark.slow
def test_answers_may_be_a_table_and_files_are_found_beside_the_input(run, root, capsys):
    folder = run("classes", "--metric-for-best", "macro_f1", folder="best by F1")
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    assert any("eval_macro_f1" in entry for entry in state["log_history"]) and state["best_metric"] is not None
    predict(folder, root, capsys, "--output", str(root / "answers.csv"), "--top-k", "2")
    with open(root / "answers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["label", "probability", "label_2", "probability_2"] and rows[2]["label"] == ""
    model = load_model(folder)
    chances = model.predict([{"text": "red square", "image": str(root / "0.png")}]).softmax(dim=1)[0]
    assert float(rows[0]["probability"]) == pytest.approx(chances.max().item(), abs=1e-4)
    with pytest.raises(SystemExit, match="top_k must be at least 1"):
        predict(folder, root, capsys, "--top-k", "0")


@pytest.mark.slow
def test_the_card_says_what_was_scored_and_its_snippet_runs(run, root):
    folder = root / "out" / "two"
    if not folder.exists():
        run("two")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert str(root) not in card and "/tmp" not in card
    (index,) = yaml.safe_load(card.split("---")[1])["model-index"]
    (results,) = index["results"]  # one table of the hub, whose rows say what was missing
    names = [metric["name"] for metric in results["metrics"]]
    assert names[:3] == ["accuracy, full", "accuracy, text missing", "accuracy, image missing"]
    assert results["dataset"]["name"] == "two.csv" and results["dataset"]["split"] == "test"
    snippet = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-P", "-c", snippet + "\nprint(model.config.num_labels)"], cwd=folder.parent,
                          capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr[-2000:]


@pytest.mark.slow
def test_rows_that_cannot_be_read_never_end_a_run(root, encoders, capsys, caplog):
    folder = root / "broken"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.png").write_bytes(b"\xff\xd8 broken" if i % 5 == 0 else (root / f"{i}.png").read_bytes())
    lines = [f"{i}.png,{'' if i in (5, 7) else 'red square'},{'xy'[i % 2]}" for i in range(30)]
    lines[8] = ",,x"
    (folder / "t.csv").write_text("image,text,label\n" + "\n".join(lines) + "\n")
    for seed, rate in enumerate((0.7, 1.0)):
        given = ["--data", str(folder / "t.csv"), "--encoders", json.dumps(encoders), "--max-steps", "3"]
        drawn = ["--seed", str(seed), "--missing-rate", str(rate)]
        main(["train", *given, *drawn, "--output-dir", str(folder / f"out{seed}")])
    assert "6 of 30 image cells cannot be decoded and count as absent (rows 1, 6, 11, 16, 21 and 1 more)" in caplog.text
    assert "2 of 30 rows have nothing that can be read (rows 6, 9)" in caplog.text
    main(["train", *given, "--all-absent", "prior", "--output-dir", str(folder / "prior")])
    assert load_model(folder / "prior").all_absent == "prior"
    rows = report(folder / "prior")
    assert all(row["n"] == rows[0]["n"] for row in rows)


@pytest.mark.slow
def test_one_modality_is_enough_for_late_fusion(root, encoders, capsys):
    given = ["--data", str(root / "classes.csv"), "--encoders", json.dumps({"text": encoders["text"]})]
    main(["train", *given, "--method", "late_fusion", "--max-steps", "2", "--output-dir", str(root / "out" / "text")])
    assert [row["scenario"] for row in report(root / "out" / "text")] == ["full"]
    assert "of 45 samples are incomplete" in (root / "out" / "text" / "README.md").read_text()


@pytest.mark.slow
def test_a_comparison_ranks_by_the_measure_of_the_task(root, encoders, capsys):
    given = ["--data", str(root / "several.csv"), "--label-separator", "/", "--encoders", json.dumps(encoders)]
    main(["compare", *given, "--methods", '["late_fusion"]', "--seeds", "[0]", "--max-steps", "1", "--output-dir",
          str(root / "compare")])  # fmt: skip
    with open(root / "compare" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["method", "scenario", "mean_macro_f1", "std_macro_f1", "seeds"]
    assert {row["method"] for row in rows} == {"late_fusion"} and (root / "compare" / "comparison.png").exists()


@pytest.mark.slow
def test_texts_that_are_cut_are_counted_before_training(root, encoders, tmp_path, caplog):
    lines = [f"{'red ' * (30 if i % 4 == 0 else 2)},{i}.png,{'xy'[i % 2]}" for i in range(40)]
    (root / "long.csv").write_text("text,image,label\n" + "\n".join(lines) + "\n")
    main(["train", "--data", str(root / "long.csv"), "--encoders", json.dumps(encoders), "--max-steps", "1",
          "--output-dir", str(tmp_path)])  # fmt: skip
    cut = [message for message in caplog.messages if "are cut to 16 tokens (the longest has 30 tokens)" in message]
    assert len(cut) == 2 and cut[0].endswith("text cells are cut to 16 tokens (the longest has 30 tokens)")


@pytest.mark.slow
def test_encoders_that_moved_are_named_on_the_command_line(run, root, encoders, capsys):
    folder = run("classes")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoders": {**encoders, "text": "/moved/away"}}))
    try:
        with pytest.raises(SystemExit, match=r"the text encoder cannot be loaded from '/moved/away': .*--encoders"):
            predict(folder, root, capsys)
        moved = ["--encoders", json.dumps({"text": encoders["text"]})]
        assert len(predict(folder, root, capsys, *moved).splitlines()) == 3
        main(["evaluate", "--model", str(folder), "--data", str(root / "classes.csv"), "--output-dir",
              str(folder / "moved"), *moved])  # fmt: skip
    finally:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_a_stream_is_trained_on(root, encoders, tmp_path):
    splits = load_table(root / "classes.csv")
    streams = {name: splits[name].to_iterable_dataset() for name in ("train", "test")}
    common = {"data": "streams", "encoders": encoders, "missing_rate": 0.5}
    rows = train(TrainOptions(**common, max_steps=3, output_dir=str(tmp_path / "out")), streams)
    assert [row["n"] for row in rows] == [len(splits["test"])] * len(rows)
    assert rows[:3] == evaluate(load_model(tmp_path / "out"), splits["test"])[:3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "none, it was a stream" in card and "About 50% of the samples are incomplete" in card
    with pytest.raises(ValueError, match="a stream has no length: set max_steps"):
        train(TrainOptions(**common, output_dir=str(tmp_path / "b"), baselines=True), streams)


@pytest.mark.slow
def test_splits_that_cannot_be_read_whole_are_trained_on(root, encoders, tmp_path, caplog):
    part = load_table(root / "classes.csv")["train"]
    rows = list(part)
    for i in range(2, len(rows), 4):
        rows[i] = {**rows[i], "image": {"bytes": b"no", "path": None}}
    rows[2]["text"] = None
    broken = datasets.Dataset.from_list(rows, features=part.features)
    options = TrainOptions(
        data="mine", encoders=encoders, max_steps=3, output_dir=str(tmp_path / "out"), missing_rate=0.9
    )
    train(options, {"train": broken, "test": part})
    assert "the train split: 1 rows have nothing that can be read (rows 3)" in caplog.text


@pytest.mark.slow
def test_a_benchmark_is_trained_with_its_broken_pictures(root, encoders, tmp_path, capsys, caplog):
    films = tmp_path / "films"
    (films / "dataset").mkdir(parents=True)
    ids = [f"{i:07}" for i in range(24)]
    for i, film in enumerate(ids):
        content = b"broken" if i % 4 == 0 else (root / f"{i}.png").read_bytes()
        (films / "dataset" / f"{film}.jpeg").write_bytes(content)
        said = {"plot": ["red square"], "genres": ["Drama", "War"][: 1 + i % 2]}
        (films / "dataset" / f"{film}.json").write_text(json.dumps(said))
    (films / "split.json").write_text(json.dumps({"train": ids[:16], "dev": ids[16:20], "test": ids[20:]}))
    main(["train", "--data", f"mmimdb:{films}", "--encoders", json.dumps(encoders), "--epochs", "1",
          "--missing-rate", "1.0", "--output-dir", str(tmp_path / "out")])  # fmt: skip
    assert "the train split: 4 of 16 image cells cannot be decoded" in caplog.text
    assert list(report(tmp_path / "out")[0])[1:3] == ["micro_f1", "macro_f1"]
    assert str(films) not in (tmp_path / "out" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------- choices
def test_what_is_chosen_for_a_table_follows_its_size_and_pictures(root):
    splits = load_table(root / "classes.csv")
    asked = TrainOptions(data=str(root / "classes.csv"))
    found = settled(asked, splits)
    assert (found.missing_rate, found.modality_dropout, found.epochs, found.batch_size) == (0.0, 0.3, 12, 16)
    assert found.image_size == 112 and settled(found, splits) is found
    assert found.separate_heads and not found.translators  # which would be too many for so few rows
    large = {"train": datasets.concatenate_datasets([splits["train"]] * 50)}
    assert settled(asked, large).epochs == 10
    assert settled(asked, large).translators and not settled(asked, large).separate_heads
    for part, name in ((splits, "translators"), (large, "separate_heads")):  # who asks for one does not ask for both
        chosen = settled(replace(asked, **{name: True}), part)
        assert {name for name in ("translators", "separate_heads") if getattr(chosen, name)} == {name}
        plain = settled(replace(asked, translators=False, separate_heads=False), part)
        assert not plain.translators and not plain.separate_heads
    assert settled(TrainOptions(epochs=1, missing_rate=0.5), splits).modality_dropout == 0.1
    assert settled(TrainOptions(data="mmimdb:/x"), splits).missing_rate == 0.7
    said = choices(asked, found, ("image", "text"))
    assert said.startswith(
        "Chosen for this data: --missing-rate 0.0 --modality-dropout 0.3 --epochs 12 --batch-size 16"
    )
    assert choices(found, found, ("image", "text")) == ""


@pytest.mark.parametrize(
    ("size", "gpu", "expected"), [(20, False, 112), (120, False, 168), (900, False, 168), (900, True, 224)]
)
def test_pictures_are_as_large_as_they_are_worth(size, gpu, expected, monkeypatch, picture_of):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert picture_size(datasets.Dataset.from_list([{"image": picture_of(size)}] * 3)) == expected


@pytest.fixture
def picture_of():
    import io

    from PIL import Image

    def picture_of(size):
        file = io.BytesIO()
        Image.new("RGB", (size, 8)).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    return picture_of


@pytest.mark.parametrize(("free", "expected"), [(2**36, 16), (3 * 2**30, 8), (2**28, 1)])
def test_the_batch_is_taken_in_parts_where_memory_is_short(free, expected, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    assert fitting_batch(16) == expected


@pytest.mark.parametrize("method", ["u2a", "pmf", "joint_embedding", "late_fusion"])
def test_the_scale_of_numbers_goes_into_the_head(method, encoders):
    from u2a_fast.methods import METHODS

    model = METHODS[method](encoders, num_labels=2, problem_type="regression", processors=tiny_data.processors()).eval()
    labels = torch.tensor([[1000.0, -5.0], [1010.0, -5.0], [1020.0, -5.0]])
    scale = StandardLabels(lambda samples: {"labels": labels}, labels)
    standard = scale([None] * 3)["labels"]
    (
        torch.testing.assert_close(standard.mean(dim=0), torch.zeros(2)),
        torch.testing.assert_close(standard[:, 1], torch.zeros(3)),
    )
    before = model.predict(tiny_data.samples(4))
    scale.into_head(model)
    torch.testing.assert_close(
        model.predict(tiny_data.samples(4)), before * scale.deviation + scale.mean, rtol=1e-4, atol=1e-3
    )
