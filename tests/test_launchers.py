"""Two processes under `accelerate launch` and `torchrun`: one run of theirs is a run of one process."""

import csv
import importlib.util
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_data
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from ranks import launched, run_command
from safetensors.torch import load_file

from u2a_fast import processes, training
from u2a_fast.block import Block
from u2a_fast.cli import main
from u2a_fast.comparison import CompareOptions, compare

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "train_distributed.py"
DDP = {"config_file": str(EXAMPLES / "accelerate" / "ddp.yaml")}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """Complete samples: then the mean of the ranks' losses is the loss of all their samples, alignment included."""
    root = tmp_path_factory.mktemp("launchers")
    table = tiny_data.write_table(root / "data", 80)
    with open(table, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["text"] and row["image"]]
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    arguments = ["--data", str(table), "--encoders", json.dumps(tiny_data.encoder_folders(root))]
    return [*arguments, "--batch-size", "8", "--modality-dropout", "0", "--missing-rate", "0", "--dtype", "float32"]


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def even(losses):
    return {step: loss for step, loss in losses.items() if step < 5}


def example(*arguments):
    """The example in this process."""
    spec = importlib.util.spec_from_file_location("train_distributed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*arguments])


@pytest.mark.slow
def test_the_example_resumes_with_more_and_with_fewer_processes(common, tmp_path):
    """36 samples in batches of 8: the fifth batch is uneven, and two processes fill it up."""
    steps = [*common[:-2], "--steps", "8", "--save-steps", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    example(*steps, "--output-dir", str(one))
    run_command(launched("accelerate", [str(SCRIPT), *steps, "--output-dir", str(two)], DDP))
    states = {folder: folder / "checkpoint-8" / "rng_state_1.pth" for folder in (one, two)}
    assert states[two].exists() and not states[one].exists()
    before = {folder: losses(folder) for folder in (one, two)}
    assert list(before[one]) == list(before[two]) == [*range(1, 9)]
    assert even(before[two]) == pytest.approx(even(before[one]), rel=1e-4)
    for later in (6, 8):
        for folder in (one, two):
            shutil.rmtree(folder / f"checkpoint-{later}")
    run_command(launched("torchrun", [str(SCRIPT), *steps, "--output-dir", str(one), "--resume"]))
    assert states[one].exists()
    example(*steps, "--output-dir", str(two), "--resume")
    for folder in (one, two):
        assert losses(folder).keys() == before[folder].keys()
        assert even(losses(folder)) == pytest.approx(even(before[folder]), rel=1e-4)


@pytest.mark.slow
def test_two_processes_of_the_command_line_write_one_run(common, tmp_path):
    arguments = ["train", *common, "--max-steps", "4"]
    main([*arguments, "--output-dir", str(tmp_path / "one")])
    said = run_command(launched("accelerate", [__file__, *arguments, "--output-dir", str(tmp_path / "two")], DDP))
    assert said.count("trainable params:") == 1 and said.count("majority") == 1
    assert "rank 1 wrote nothing" in said and "rank 0 wrote report.csv" in said
    one, two = ({str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")} for n in ("one", "two"))
    assert {"checkpoint-4/rng_state_0.pth", "checkpoint-4/rng_state_1.pth"} == two - one
    assert {"checkpoint-4/rng_state.pth"} == one - two
    whole, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-3, rtol=1e-3, msg=name)  # Adam enlarges what is tiny


def test_accelerate_knows_every_setting_of_our_files():
    """FSDP2 of accelerate needs GPUs: here, that the file asks for what tests/test_distributed.py does by hand."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    files = {path.stem: load_config_from_file(str(path)) for path in (EXAMPLES / "accelerate").glob("*.yaml")}
    kinds = {name: config.distributed_type.value for name, config in files.items()}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert files["fsdp2"].fsdp_config.keys() <= known.keys()
    assert files["fsdp2"].fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == Block.__name__


def test_what_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    several = SimpleNamespace(num_processes=3, is_main_process=True)
    monkeypatch.setattr(processes, "PartialState", lambda **given: several)
    with pytest.raises(ValueError, match="--batch-size 16 cannot be shared by 3 processes: make it a multiple"):
        processes.share(16)
    with pytest.raises(ValueError, match="start it without a launcher"):
        compare(CompareOptions(output_dir=str(tmp_path)))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="--batch-size 16 cannot be shared by 3 processes: make it a multiple"):
        example("--output-dir", str(tmp_path / "out"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"see examples/train_distributed\.py"):
        training.train(training.TrainOptions(output_dir=str(tmp_path)))


def test_the_package_runs_as_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["u2a_fast", "train", "--batch-size", "0"])
    with pytest.raises(SystemExit, match="--batch-size must be above 0"):
        runpy.run_module("u2a_fast", run_name="__main__")


def watched(arguments):
    """The command line in a process that a launcher started, and what it wrote into the folder of the run."""
    rank, folder, written = os.environ["RANK"], arguments[-1], set()

    def watch(event, given):
        if event in ("open", "os.mkdir", "os.rename") and str(given[0]).startswith(folder):
            reads = event == "open" and given[1] is not None and not set(given[1]) & set("wax+")
            if not reads:
                written.add(Path(str(given[0])).name)

    sys.addaudithook(watch)
    main(arguments)
    written.discard("checkpoint-4")  # Trainer makes sure that it is there for rng_state_1.pth
    print(f"rank {rank} wrote {'report.csv' if 'report.csv' in written else sorted(written) or 'nothing'}")


if __name__ == "__main__":
    watched(sys.argv[1:])
