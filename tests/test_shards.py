"""`accelerate launch --config_file examples/accelerate/fsdp2.yaml`: sharded, a run is still the run of one process.

accelerate itself shards on GPUs alone; tests/support/shard_on_cpus.py lifts that, and nothing else.
"""

import shutil

import launches
import pytest
import ranks
import torch
from accelerate import Accelerator, DistributedType
from launches import losses
from safetensors.torch import load_file
from shard_on_cpus import shard_on_cpus

from u2a_fast.cli import main

FSDP2 = {"config_file": str(launches.EXAMPLES / "accelerate" / "fsdp2.yaml")}
STORED = ("pytorch_model_fsdp.bin", "optimizer.bin")  # by accelerate, where it shards
pytestmark = pytest.mark.slow


def told(run, world):
    """What `run()` prints in forks that are told what `accelerate launch` tells its processes."""
    return ranks.run_ranks(run, world, **ranks.settings(FSDP2["config_file"], world))


def sharded(*given):
    shard_on_cpus()
    launches.example(*given)


def commanded(*given):
    shard_on_cpus()
    launches.watched([*given])


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """32 samples to train on in batches of 8: none is uneven."""
    return [*launches.arguments(tmp_path_factory.mktemp("shards"), 72), "--steps", "6", "--save-steps", "2"]


@pytest.fixture(scope="module")
def alone(common, tmp_path_factory):
    """The losses of one process that shards nothing."""
    folder = tmp_path_factory.mktemp("alone")
    launches.example(*common, "--output-dir", str(folder))
    return losses(folder)


def test_the_example_is_the_run_of_one_process_and_goes_on_in_more_and_in_fewer(common, alone, tmp_path):
    given = [*common, "--output-dir", str(tmp_path)]
    told(lambda: sharded(*given), world=1)
    for kept, world in ((2, 2), (4, 1)):
        assert losses(tmp_path) == pytest.approx(alone, rel=1e-4)
        assert all((tmp_path / f"checkpoint-{kept}" / name).exists() for name in STORED)
        for step in range(kept + 2, 8, 2):
            shutil.rmtree(tmp_path / f"checkpoint-{step}")
        (tmp_path / "model.safetensors").unlink()
        told(lambda: sharded(*given, "--resume"), world)
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-4)
    for step, world in ((2, 1), (4, 2), (6, 1)):  # nobody began anew
        assert len([*(tmp_path / f"checkpoint-{step}").glob("rng_state*.pth")]) == world
    assert (tmp_path / "model.safetensors").exists()


def test_two_processes_of_the_command_line_write_one_run(common, tmp_path):
    given = ["train", *common[:-4], "--dtype", "float32", "--max-steps", "4"]
    main([*given, "--output-dir", str(tmp_path / "one")])
    said = "".join(told(lambda: commanded(*given, "--output-dir", str(tmp_path / "two")), world=2))
    assert said.count("trainable params:") == 1 and said.count("majority") == 1
    assert "rank 1 wrote nothing" in said and "rank 0 wrote report.csv" in said
    one, two = ({str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("*")} for n in ("one", "two"))
    assert two - one == {f"checkpoint-4/{name}" for name in ("rng_state_0.pth", "rng_state_1.pth", *STORED)}
    assert one - two == {"checkpoint-4/rng_state.pth", "checkpoint-4/optimizer.pt"}
    assert "FSDP" not in (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    whole, shared = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, atol=1e-3, rtol=1e-3, msg=name)  # Adam enlarges what is tiny


def test_where_accelerate_would_not_shard_nothing_is_trained(common, tmp_path):
    """As it is on CPUs: `Accelerator(cpu=True)` under this file is that of DDP."""

    def refused():
        with pytest.raises(SystemExit, match="accelerate shards models on GPUs only"):
            launches.example(*common, "--output-dir", str(tmp_path / "example"))
        cure = "accelerate shards this model on GPUs only, with fsdp_version: 2 in its file"
        with pytest.raises(SystemExit, match=cure):
            main(["train", *common[:-4], "--output-dir", str(tmp_path / "run")])
        assert Accelerator().distributed_type == DistributedType.MULTI_CPU

    told(refused, world=1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
