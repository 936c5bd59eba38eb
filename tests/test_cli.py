"""The command line trains, evaluates and predicts on a user's own table, and explains mistakes in one sentence."""

import csv
import json

import pytest
import tiny_data
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from u2a_fast.cli import main


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
    assert "Table hash" in card and "Seed 0" in card and "torch 2" in card
    assert (trained / "report.png").exists()


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


def test_a_directory_of_another_run_or_model_is_refused(trained, common, root):
    again = ["train", *common, "--output-dir", str(trained), "--batch-size", "4"]
    before = (trained / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"holds another run .*seed.*choose another output_dir"):
        main([*again, "--baselines", "--seed", "3"])
    with pytest.raises(SystemExit, match="holds this run already: pass --resume"):
        main([*again, "--baselines"])
    with pytest.raises(SystemExit, match=r"holds another model \(bert\)"):
        main(["train", *common, "--output-dir", str(root / "encoders" / "text")])
    assert (trained / "model.safetensors").read_bytes() == before


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
    main([*arguments, "--output-dir", str(root / "halved"), "--resume"])
    whole, halved = (load_file(root / name / "model.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == halved.keys() and all(torch.equal(whole[name], halved[name]) for name in whole)


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
        (["train", "--data", "/nowhere/at/all.csv", "--output-dir", "{}"], "nowhere"),
        (["train", "--method", "magic", "--output-dir", "{}"], "unknown method 'magic': use one of u2a"),
        (["predict", "--model", "{}", "--input", "/nowhere.jsonl"], "nowhere|not"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as caught:
        main([a.format(tmp_path / "out") for a in arguments])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_doctor_names_what_it_found(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("torch", "backend", "bfloat16", "bitsandbytes"))
