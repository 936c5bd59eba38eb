"""Quantised encoders under FSDP2, two ranks on the CPU: sharded by rows, and the numbers of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_encoders
import torch
from torch import distributed

from u2a_fast import U2A, LoraConfig
from u2a_fast.block import Block


def build(mode):
    """The 45 rows of fc1 do not divide by two ranks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 45}
    encoders = {name: tiny_encoders.build(family, **sizes) for name, family in {"image": "vit", "text": "bert"}.items()}
    model = U2A(encoders, num_labels=3, lora=LoraConfig(r=2), quantization=mode, modality_dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(rank):
    inputs = {n: tiny_encoders.inputs(f, 4, seed=rank) for n, f in {"image": "vit", "text": "bert"}.items()}
    present = torch.ones(4, 2, dtype=torch.bool)
    present[:, rank] = False  # each rank lacks a modality altogether
    return {**inputs, "modality_mask": present, "labels": torch.arange(4) % 3}


def gradients(model, inputs):
    model(**inputs).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def run_rank(rank, mode):
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", rank=rank, world_size=2)
    single = [gradients(build(mode), batch(r)) for r in range(2)]
    model = build(mode)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block)
    fully_shard(model)
    weight = model.encoders["text"].blocks[1].fc1.weight
    assert weight.dtype == torch.int8 and weight.to_local().shape[0] in (22, 23), weight.to_local().shape
    sharded = gradients(model, batch(rank))
    for name, gradient in sharded.items():
        expected = sum(grads.get(name, torch.zeros_like(gradient)) for grads in single) / 2
        assert torch.allclose(gradient, expected, atol=1e-5), name
    assert any("lora_a" in name for name in sharded)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="its shards all require gradients; integers cannot")
@pytest.mark.parametrize("mode", ["int8", "int8_w8a8"])
def test_int8_shards_and_its_gradients_are_the_mean_of_the_ranks(mode):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tiny_encoders.__file__).parent),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), mode], env=environment, **pipes) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
