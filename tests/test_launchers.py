"""Two processes under `accelerate launch` and `torchrun`: one run of theirs is a run of one process."""

import runpy
import shutil
import sys
from types import SimpleNamespace

import launches
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from launches import EXAMPLES, SCRIPT, example, losses
from ranks import launched, run_command, run_ranks, settings
from safetensors.torch import load_file

from u2a_fast import processes
from u2a_fast.block import Block
from u2a_fast.cli import main
from u2a_fast.comparison import CompareOptions, compare

DDP = {"config_file": str(EXAMPLES / "accelerate" / "ddp.yaml")}


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    return launches.arguments(tmp_path_factory.mktemp("launchers"))


def even(losses):
    return {step: loss for step, loss in losses.items() if step < 5}


@pytest.mark.slow
def test_the_example_resumes_with_more_and_with_fewer_processes(common, tmp_path):
    """36 samples in batches of 8: the fifth batch is uneven, and two processes fill it up."""
    steps = [*common, "--steps", "8", "--save-steps", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    example(*steps, "--output-dir", str(one))
    run_ranks(lambda: example(*steps, "--output-dir", str(two)), **settings(DDP["config_file"], 2))
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
    arguments = ["train", *common, "--dtype", "float32", "--max-steps", "4"]
    main([*arguments, "--output-dir", str(tmp_path / "one")])
    shared = [launches.__file__, *arguments, "--output-dir", str(tmp_path / "two")]
    said = run_command(launched("accelerate", shared, DDP))
    assert said.count("trainable params:") == 1 and said.count("majority") == 1
    assert "rank 1 wrote nothing" in said and "rank 0 wrote report.csv" in said
    one, two = ({str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")} for n in ("one", "two"))
    assert {"checkpoint-4/rng_state_0.pth", "checkpoint-4/rng_state_1.pth"} == two - one
    assert {"checkpoint-4/rng_state.pth"} == one - two
    whole, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-3, rtol=1e-3, msg=name)  # Adam enlarges what is tiny


def test_accelerate_knows_every_setting_of_our_files():
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


def test_a_run_goes_on_as_it_began_sharded_or_whole(tmp_path):
    whole, sharded = (SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=kind)) for kind in (False, True))
    processes.check_shards(whole, str(tmp_path))
    with pytest.raises(ValueError, match="was written under DDP or a single process: resume it under the same"):
        processes.check_shards(sharded, str(tmp_path))
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    processes.check_shards(sharded, str(tmp_path))
    with pytest.raises(ValueError, match="was written under FSDP2: resume it under the same"):
        processes.check_shards(whole, str(tmp_path))


def test_the_package_runs_as_a_module(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["u2a_fast", "train", "--batch-size", "0"])
    with pytest.raises(SystemExit, match="--batch-size must be above 0"):
        runpy.run_module("u2a_fast", run_name="__main__")
