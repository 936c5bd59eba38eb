"""The command line trains, evaluates and predicts on a user's own table, and explains mistakes in one sentence."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_data
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from u2a_fast import commands, load_model
from u2a_fast.cli import build_parser, main
from u2a_fast.data import load_table
from u2a_fast.evaluation import scenario_logits
from u2a_fast.methods import METHODS
from u2a_fast.options import TrainOptions, load_sources

COLOURS = sorted(tiny_data.COLOURS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def common(root):
    table = tiny_data.write_table(root / "data", 60)
    return ["--data", str(table), "--encoders", json.dumps(tiny_data.encoder_folders(root)), "--max-steps", "4"]


@pytest.fixture(scope="module")
def trained(root, common):
    folder = root / "trained"
    main(["train", *common, "--output-dir", str(folder), "--batch-size", "4", "--baselines"])
    return folder


@pytest.mark.slow
def test_train_writes_checkpoint_report_and_card(trained):
    assert all("encoders" not in name or "lora" in name for name in load_file(trained / "model.safetensors"))
    with open(trained / "report.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scenarios = [row["scenario"] for row in rows]
    assert scenarios[:3] == ["full", "text missing", "image missing"] and "rate 0.9" in scenarios
    assert {"full [late fusion]", "text only [unimodal]", "image only [unimodal]"} <= set(scenarios)
    card = (trained / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "u2a_fast" and metadata["model-index"]
    assert "Data hash" in card and "Table hash" in card and "Seed 0" in card and "torch 2" in card
    assert (trained / "report.png").exists()


@pytest.mark.slow
def test_evaluate_and_predict_reload_the_folder(trained, common, root, capsys):
    main(["evaluate", "--model", str(trained), "--data", common[1], "--output-dir", str(root / "again")])
    first, again = (trained / "report.csv").read_text(), (root / "again" / "report.csv").read_text()
    assert again.splitlines() == [line for line in first.splitlines() if "[" not in line]
    samples = root / "samples.jsonl"
    samples.write_text('{"text": "red square"}\n\n{"image": "%s"}\n' % (root / "data" / "0.png"), encoding="utf-8")
    capsys.readouterr()
    main(["predict", "--model", str(trained), "--input", str(samples)])
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(predictions) == 2 and all(p["label"] in tiny_data.COLOURS for p in predictions)


@pytest.mark.slow
def test_columns_that_a_model_does_not_read_stop_nothing(trained, common, tmp_path, capsys, monkeypatch):
    header, *rows = Path(common[1]).read_text(encoding="utf-8").splitlines()
    table = Path(common[1]).with_name("test.csv")
    table.write_text("\n".join([f"{header},audio", *(f"{row},gone.wav" for row in rows)]), encoding="utf-8")
    main(["evaluate", "--model", str(trained), "--data", str(table), "--output-dir", str(tmp_path / "out")])
    capsys.readouterr()
    main(["predict", "--model", str(trained), "--input", str(table)])
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    line = b'{"text": "red", "audio": "https://a.b/c.wav", "recording": "c.wav"}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line)))
    main(["predict", "--model", str(trained), "--input", "-"])
    assert "label" in json.loads(capsys.readouterr().out)
    table.write_text("image,text\ngone.png,red\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="none of the 1 files of the column image"):
        main(["predict", "--model", str(trained), "--input", str(table)])
    table.unlink()


def test_columns_without_an_encoder_stop_no_training(tmp_path):
    (tmp_path / "t.csv").write_text("text,audio,label\n" + "".join(f"a{i},gone.wav,{i % 2}\n" for i in range(20)))
    options = TrainOptions(data=str(tmp_path / "t.csv"), encoders={"text": "somewhere"})
    assert load_sources(options)[0]["train"].column_names == ["text", "label"]
    for encoders in (None, {"text": "somewhere", "odio": "somewhere"}):
        with pytest.raises(FileNotFoundError, match="none of the 20 files of the column audio"):
            load_sources(replace(options, encoders=encoders))


@pytest.mark.slow
def test_evaluate_splits_by_the_seed_of_the_run(common, tmp_path, monkeypatch):
    """By another seed most of the test split was trained on."""
    out, drawn, load_splits = tmp_path / "out", [], commands.load_splits
    main(["train", *common, "--seed", "3", "--output-dir", str(out)])

    def watched(data, seed, **table):
        drawn.append(seed)
        return load_splits(data, seed, **table)

    monkeypatch.setattr(commands, "load_splits", watched)
    evaluated = ["evaluate", "--model", str(out), "--data", common[1], "--output-dir", str(tmp_path / "again")]
    main(evaluated)
    assert (tmp_path / "again" / "report.csv").read_text() == (out / "report.csv").read_text()
    main([*evaluated, "--seed", "1"])
    (out / "run.yaml").unlink()
    main(evaluated)
    assert drawn == [3, 1, 0]


@pytest.mark.slow
def test_evaluate_splits_the_table_of_the_run_as_the_run_did(common, root, tmp_path, caplog):
    table, out = tmp_path / "data" / "table.csv", tmp_path / "out"
    tiny_data.write_table(tmp_path / "data", 60)
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    folds = [f"{row},{'train' if i % 3 else 'test'}" for i, row in enumerate(rows)]
    table.write_text("\n".join([header + ",fold", *folds]), encoding="utf-8")
    main(["train", "--data", str(table), *common[2:], "--columns", '{"split": "fold"}', "--output-dir", str(out)])
    evaluated = ["evaluate", "--model", str(out), "--data", str(table), "--output-dir", str(tmp_path / "again")]
    main(evaluated)
    assert (tmp_path / "again" / "report.csv").read_text() == (out / "report.csv").read_text()
    assert "may have trained on" not in caplog.text
    table.write_text("\n".join([header, *rows]), encoding="utf-8")
    main(evaluated)
    assert "15 of 60 rows, is not that of the run" in caplog.text
    caplog.clear()
    table.rename(table.with_name("test.csv"))
    main([*evaluated[:4], str(table.with_name("test.csv")), *evaluated[5:]])
    with open(tmp_path / "again" / "report.csv", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["n"] == "60"
    assert "may have trained on" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("source", ["table", "stdin"])
def test_columns_and_separator_of_the_run_are_those_of_evaluate_and_predict(
    source, common, tmp_path, capsys, monkeypatch
):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = [(COLOURS[i % 3 - 1], COLOURS[i % 3], "|".join({COLOURS[i % 3], COLOURS[i % 2]})) for i in range(12)]
    for name in ("train", "test"):
        lines = [json.dumps({"title": title, "Headline": text, "label": label}) for title, text, label in rows]
        (data / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = ["--encoders", json.dumps({"text": json.loads(common[3])["text"]}), "--max-steps", "1"]
    given = ["--columns", '{"text": "headline"}', "--label-separator", "|"]
    main(["train", "--data", str(data), *text, *given, "--method", "late_fusion", "--output-dir", str(out)])
    main(["evaluate", "--model", str(out), "--data", str(data), "--output-dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "report.csv").read_text() == (out / "report.csv").read_text()

    def answers(*more):
        content = io.BytesIO((data / "test.jsonl").read_bytes())
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=content))
        place = str(data / "test.jsonl") if source == "table" else "-"
        capsys.readouterr()
        main(["predict", "--model", str(out), "--input", place, *more])
        return capsys.readouterr().out

    assert answers() == answers("--columns", '{"text": "Headline"}') != answers("--columns", '{"text": "title"}')


@pytest.mark.parametrize("name", ["run.yaml", "config.json"])
def test_evaluate_does_not_replace_the_report_of_a_run_or_baseline(name, common, tmp_path):
    (tmp_path / name).write_text("seed: 3\n")
    (tmp_path / "report.csv").write_text("scenario\n")
    with pytest.raises(SystemExit, match=rf"holds a model \({name}\) and perhaps its report, which would be replaced"):
        main(["evaluate", "--model", str(tmp_path), "--data", common[1], "--output-dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {name, "report.csv"}


@pytest.mark.slow
def test_evaluate_names_the_splits_that_it_found(trained, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nred,red\n")
    given = ["evaluate", "--model", str(trained), "--data", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="has no test split, only train: put all rows into one table"):
        main(given)
    (tmp_path / "test.csv").write_text("text,label\nred,zebra\n")
    with pytest.raises(SystemExit, match="this model has no class 'zebra'"):
        main(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_where_answers_go_is_looked_at_before_anything_is_answered(trained, tmp_path, monkeypatch):
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"text": "red square"}\n', encoding="utf-8")
    given = ["predict", "--model", str(trained), "--input", str(samples), "--output"]
    main([*given, str(tmp_path / "new" / "answers.jsonl")])
    assert json.loads((tmp_path / "new" / "answers.jsonl").read_text())["label"] in tiny_data.COLOURS
    monkeypatch.setattr(commands, "predict_answers", lambda *_: pytest.fail("it was answered"))
    with pytest.raises(SystemExit, match="new is a folder: name a file in it"):
        main([*given, str(tmp_path / "new")])


@pytest.mark.slow
def test_a_directory_of_another_run_or_model_is_refused(trained, common, root):
    again = ["train", *common, "--output-dir", str(trained), "--batch-size", "4"]
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"holds another run .*seed.*choose another output_dir"):
        main([*again, "--baselines", "--seed", "3"])
    with pytest.raises(SystemExit, match="holds this run already: pass --resume"):
        main([*again, "--baselines"])
    with pytest.raises(SystemExit, match=r"holds another model \(config.json\)"):
        main(["train", *common, "--output-dir", str(root / "encoders" / "text")])
    assert (trained / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoint-5/trainer_state.json", "adapter_config.json", "pytorch_model.bin"])
def test_what_others_left_is_not_overwritten(name, common, tmp_path):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(SystemExit, match="holds another model"):
        main(["train", *common, "--output-dir", str(tmp_path / "out")])
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]


@pytest.mark.slow
def test_evaluate_reads_classes_by_name(trained, common, tmp_path):
    """A test split without the first class numbers the others anew; the model's numbers are what counts."""
    with open(common[1], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores = {}
    for name, kept in {"all": COLOURS, "late": COLOURS[1:]}.items():
        folder = tmp_path / name
        folder.mkdir()
        with open(folder / "test.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "text", "label"])
            writer.writeheader()
            for row in rows:
                if row["label"] in kept:
                    writer.writerow({**row, "image": row["image"] and str(Path(common[1]).parent / row["image"])})
        model, data = load_model(trained, dtype=torch.float32), load_table(folder)["test"]
        logits, _, labels = scenario_logits(model, data, ["full"], 16, 0)
        assert [model.config.id2label[i] for i in labels.tolist()] == [r["label"] for r in rows if r["label"] in kept]
        scores[name] = logits["full"]
    # Close, not equal: the samples stand in batches of other sizes, which some CPUs multiply in another order.
    torch.testing.assert_close(scores["late"], scores["all"][[row["label"] in COLOURS[1:] for row in rows]])


@pytest.mark.slow
def test_an_interrupted_run_goes_on(common, root, monkeypatch):
    arguments = ["train", *common[:4], "--batch-size", "16", "--epochs", "2"]
    main([*arguments, "--output-dir", str(root / "whole")])
    save = Trainer._save_checkpoint

    def stop_after_saving(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", stop_after_saving)
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, "--output-dir", str(root / "halved")])
    torn = root / "halved" / "checkpoint-999"  # what a kill in the middle of writing leaves
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    main([*arguments, "--output-dir", str(root / "halved"), "--resume"])
    whole, halved = (load_file(root / name / "model.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == halved.keys() and all(torch.equal(whole[name], halved[name]) for name in whole)


@pytest.mark.slow
def test_options_come_from_yaml_and_flags_win(common, root):
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump({"lora_r": 3, "lora_alpha": 3, "seed": 5}), encoding="utf-8")
    main(["train", "--config", str(config), *common, "--seed", "6", "--output-dir", str(root / "yaml")])
    saved = json.loads((root / "yaml" / "config.json").read_text(encoding="utf-8"))
    assert saved["arguments"]["lora"]["r"] == 3
    assert yaml.safe_load((root / "yaml" / "run.yaml").read_text())["seed"] == 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--data", "/nowhere/at/all.csv"], "nowhere"),
        (["train", "--method", "magic"], "unknown method 'magic': use one of u2a"),
        (["train", "--missing-kind", "txt"], "kind must be 'both', 'any' or one of"),
        (["train", "--dtype", "float3"], "dtype must be one of"),
        (["train", "--encoders", '{"image": "{encoders}/image", "txt": "{encoders}/text"}'], "unknown modality 'txt'"),
        (["train", "--encoders", '{"image": "/nowhere", "text": "{encoders}/text"}'], "nowhere"),
        (["train", "--data", "{tables}/one_row.csv"], "the (train|test) split of .*one_row.csv has no rows: add some"),
        (["train", "--data", "{tables}/one_class"], "has one class only: there is nothing to tell apart"),
        (["train", "--data", "{tables}/unlabelled_test"], "the test split of .* needs a label column"),
        (["train", "--data", "{tables}/empty_rows.csv"], "has no row with anything that can be read"),
        (["train", "--batch-size", "0"], "--batch-size must be above 0, not 0"),
        (["train", "--epochs", "-1"], "--epochs must be above 0, not -1"),
        (["train", "--learning-rate", "0"], "--learning-rate must be above 0"),
        (["train", "--class-weights", "equal"], 'class_weights must be one of .null, "balanced"'),
        (["train", "--metric-for-best", "map"], 'metric_for_best must be one of ."accuracy", "macro_f1"'),
        (["train", "--all-absent", "skip"], "all_absent must be one of"),
        (["train", "--all-absent", "prior", "--method", "pmf"], 'all_absent must be "error", since nothing present'),
        (["train", "--task", "ranking"], "task must be one of classification, multi_label, regression"),
        (["train", "--data", "mmimdb:/nowhere"], "/nowhere/split.json is missing"),
        (["train", "--data", "{tables}/unlabelled.csv"], "needs a label column of class names"),
        (["train", "--data", "{tables}/split"], "has no test split"),
        (["train", "--data", "{tables}/misnamed", "--encoders", "null"], "has no train split, only test: put all rows"),
        (["train", "--max-steps", "0"], "--max-steps must be above 0, or -1 for as many as --epochs says, not 0"),
        (["train", "--seed", "-1"], "--seed must be 0 or more, not -1"),
        (["train", "--weight-decay", "-1"], "--weight-decay must be 0 or more, not -1"),
        (["train", "--data", ""], "--data is empty: give it a value, or leave it out"),
        (["train", "--output-dir", ""], "--output-dir is empty"),
        (["train", "--output-dir", "{tables}/one_row.csv"], "one_row.csv is a file: a run needs a folder"),
        (["train", "--output-dir", "{tables}/one_row.csv/in"], "one_row.csv is a file: a run needs a folder"),
        (["compare", "--output-dir", "{tables}/one_row.csv"], "one_row.csv is a file: a run needs a folder"),
        (["train", "--data", "emoji", "--task", "regression"], "--task says how a table is read, and emoji is none"),
        (["train", "--data", "food101:/nowhere", "--columns", '{"text": "t"}'], "--columns says .* and food101:/nowh"),
        (["compare", "--data", "stamps", "--label-separator", "|"], "--label-separator says .* stamps is none: leave"),
        (["evaluate", "--data", "mmimdb:/nowhere", "--columns", '{"text": "t"}'], "--columns says how a table is read"),
        (
            ["train", "--encoders", '{"text": "{encoders}/text"}'],
            "U2A needs 2 encoders or more, not 1: LateFusion takes",
        ),
        (["evaluate", "--seed", "-3"], "--seed must be 0 or more, not -3"),
        (["evaluate", "--output-dir", ""], "--output-dir is empty"),
        (["predict", "--input", ""], "--input is empty"),
        (
            ["predict", "--model", "/nowhere", "--input", "{tables}/one_class"],
            "one_class holds 2 tables, train and test: name the one to answer",
        ),
        (["predict", "--model", "{out}", "--input", "/nowhere.jsonl"], "nowhere|not"),
        (
            ["predict", "--model", "/nowhere", "--input", "{tables}/list.jsonl"],
            "each line of the input must be",
        ),
        (["evaluate", "--model", "/nowhere"], "/nowhere is no folder of a trained model, nor a model of the Hugging"),
        (
            ["predict", "--model", "{tables}", "--input", "{tables}/one_row.csv"],
            r"name the output_dir .*\(it holds no conf",
        ),
        (["predict", "--model", "/no/where", "--input", "{tables}/one_row.csv"], "/no/where is no folder of a trained"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(arguments, message, common, root, tmp_path):
    tables = tmp_path / "tables"
    (tables / "split").mkdir(parents=True)
    (tables / "one_row.csv").write_text("text,label\nred,x\n")
    (tables / "unlabelled.csv").write_text("text\nred\nblue\n")
    (tables / "split" / "train.csv").write_text("text,label\nred,a\nblue,b\n")
    (tables / "list.jsonl").write_text("[1]\n")
    (tables / "empty_rows.csv").write_text("text,image,label\n,,x\n,,y\n")
    for folder, train, test in (("one_class", "text,label\na,x\nb,x\n", "text,label\na,x\n"),
                                ("unlabelled_test", "text,label\na,x\nb,y\n", "text\na\n"),
                                ("misnamed", "", "text,label\na,x\nb,y\n")):  # fmt: skip
        (tables / folder).mkdir()
        (tables / folder / "train.csv").write_text(train)
        (tables / folder / "test.csv").write_text(test)
    (tables / "misnamed" / "train.csv").rename(tables / "misnamed" / "training_set.csv")
    places = {"{out}": tmp_path / "out", "{tables}": tables, "{encoders}": root / "encoders"}
    for place, path in places.items():
        arguments = [argument.replace(place, str(path)) for argument in arguments]
    own = [*common, "--output-dir", str(tmp_path / "out")]
    given = {"train": own, "compare": own, "predict": []}.get(arguments[0], ["--data", common[1]])
    with pytest.raises(SystemExit, match=message) as caught:
        main([arguments[0], *given, *arguments[1:]])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("separator", ["~", "#", "null", "|"])
def test_a_separator_is_what_was_typed(separator):
    parsed = build_parser().parse_args(["train", f"--label-separator={separator}"])
    assert parsed.train.label_separator == separator and parsed.train.task is None


@pytest.mark.slow
def test_help_names_every_method_and_imports_little(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said.partition("which method to train")[2][:70] for name in METHODS)
    heavy = "import sys, u2a_fast.cli; print({'transformers', 'datasets', 'scipy', 'peft'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_doctor_names_what_it_found(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch", "backend", "bfloat16", "bitsandbytes"))
