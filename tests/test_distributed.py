"""DDP and FSDP2, two ranks on the CPU: whoever lacks a modality takes part all the same, and gradients are the mean."""

import copy
from datetime import timedelta

import pytest
import tiny_encoders
import torch
from ranks import run_ranks
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig
from u2a_fast.block import Block
from u2a_fast.losses import StandardLabels

FAMILIES = {"image": "vit", "text": "bert"}
METHODS = {
    "u2a": lambda encoders, **given: U2A(encoders, 3, lora=LoraConfig(r=2), modality_dropout=0.0, **given),
    "u2a_where": lambda encoders, **given: U2A(
        encoders, 3, lora=LoraConfig(r=2), modality_dropout=0.0, absent="where", **given
    ),
    "pmf": lambda encoders, **given: PMF(encoders, 3, fusion_layers=1, **given),
    "joint_embedding": lambda encoders, **given: JointEmbedding(encoders, 3, **given),
    "late_fusion": lambda encoders, **given: LateFusion(encoders, 3, lora=LoraConfig(r=2), **given),
}
# What each of the two ranks lacks in one step after another; "-" before a name: the keyword itself is left out.
LACKING = [("image", ""), ("", "-text"), ("-image", "text"), ("-text", "-text"), ("", "")]
NO_INTEGERS = torch.__version__.startswith("2.11.")
INTEGERS_SHARD = pytest.mark.skipif(NO_INTEGERS, reason="its shards all require gradients; integers cannot")
STATIC = ("u2a", {"static_graph": True})
STORED = ("int8", "int8_w8a8", "nf4")
STEP = 0.1
SPREAD = torch.tensor([[1.0, 20.0, 300.0], [5.0, 21.0, -300.0]])  # numbers that three heads learn


def build(method, mode=None):
    """The 45 rows of fc1 do not divide by two ranks, nor do the 3 classes."""
    torch.manual_seed(0)
    hidden = (32, 4, 46) if mode == "nf4" else (30, 3, 45)  # whole blocks of 64 weights
    sizes = dict(zip(("hidden_size", "num_attention_heads", "intermediate_size"), hidden, strict=True))
    encoders = {name: tiny_encoders.build(family, **sizes) for name, family in FAMILIES.items()}
    model = METHODS[method](encoders, quantization=mode)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch(step, rank):
    """5 samples on rank 0 and 3 on rank 1, texts of several lengths, and one modality missing here and there."""
    count, seed, lacking = (5, 3)[rank], 10 * step + rank, LACKING[step][rank]
    inputs = {n: tiny_encoders.inputs(f, count, seed=seed, padded=True) for n, f in FAMILIES.items()}
    present = torch.ones(count, 2, dtype=torch.bool)
    present[1, step % 2] = False
    if lacking:
        present[:] = True
        present[:, list(FAMILIES).index(lacking.lstrip("-"))] = False
    if lacking.startswith("-"):
        del inputs[lacking[1:]]
    return {**inputs, "modality_mask": present, "labels": torch.arange(count) % 3}


def gradients(model, inputs):
    """`{name: gradient}` of every trained parameter, zeros where there is none."""
    for parameter in model.parameters():
        parameter.grad = None
    model(**inputs).loss.backward()
    found = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in found.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(model, blocks=True):
    from torch.distributed.fsdp import fully_shard

    for block in [module for module in model.modules() if blocks and isinstance(module, Block)]:
        fully_shard(block)
    return fully_shard(model)


def train_beside_a_single_process(model, reference, rank):
    """Steps of SGD: every rank's gradients are the mean of what single processes have of the ranks' batches."""
    with torch.no_grad():
        for step in range(len(LACKING)):
            with torch.enable_grad():
                own = gradients(model, batch(step, rank))
                each = [gradients(reference, batch(step, other)) for other in range(2)]
            expected = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
            assert own.keys() == expected.keys()
            for name, gradient in own.items():
                torch.testing.assert_close(whole(gradient), expected[name], atol=1e-5, rtol=1e-4, msg=name)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter -= STEP * own[name.removeprefix("module.")]
            for name, parameter in reference.named_parameters():
                if parameter.requires_grad:
                    parameter -= STEP * expected[name]


def run_ddp(rank):
    for method, options in [*((method, {"find_unused_parameters": False}) for method in METHODS), STATIC]:
        model = build(method)
        train_beside_a_single_process(DistributedDataParallel(model, **options), build(method), rank)
        trained = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        others = [torch.empty_like(trained) for _ in range(2)]
        distributed.all_gather(others, trained)
        assert torch.equal(*others), f"{method}: the ranks have drifted apart"


def run_fsdp(rank, method, mode):
    model = shard(build(method, mode), blocks=method != "pmf")
    weight = model.encoders["text"].blocks[1].fc1.weight
    rows, stored = whole(weight).shape[0], build(method, mode).encoders["text"].blocks[1].fc1.weight
    assert weight.dtype == stored.dtype and rows == len(stored)
    assert weight.to_local().shape[0] in (rows // 2, rows - rows // 2), weight.to_local().shape
    assert torch.equal(whole(weight), stored)
    train_beside_a_single_process(model, build(method, mode), rank)


def run_every_fsdp(rank):
    for method, mode in [*(("u2a", mode) for mode in STORED), *((method, None) for method in METHODS)]:
        run_fsdp(rank, method, mode)
    with pytest.raises(ValueError, match="NO_WRAP"):
        shard(build("pmf"))(**batch(0, rank))
    scale, (own, reference) = StandardLabels(None, SPREAD), (build("u2a"), build("u2a"))
    for model in (shard(own), reference):
        scale.into_head(model)
    torch.testing.assert_close(whole(own.head.weight), reference.head.weight)
    torch.testing.assert_close(whole(own.head.bias), reference.head.bias)


class Gathered(TorchDispatchMode):
    """Bytes that processes collect from each other and sum up for each other, as torch.distributed is told."""

    def __init__(self):
        super().__init__()
        self.collected = self.summed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "allgather" in name:
            self.collected += args[0].nbytes
        elif "reduce_scatter" in name:
            self.summed += args[1].nbytes
        return func(*args, **(kwargs or {}))


def traffic(model, inputs):
    """Bytes of one step: `{"ddp": all-reduced, "fsdp_collected": .., "fsdp_summed": ..}`, of all processes' shares."""
    reduced = []

    def count(_, bucket):
        reduced.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(distributed.group.WORLD, bucket)

    parallel = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=False)
    parallel.register_comm_hook(None, count)
    parallel(**inputs).loss.backward()
    with Gathered() as gathered:
        shard(model)(**inputs).loss.backward()
    return {"ddp": sum(reduced), "fsdp_collected": gathered.collected, "fsdp_summed": gathered.summed}


def shared(parameters):
    """Bytes of parameters whose rows are filled up so that two ranks have equally many."""
    return sum(p.nbytes // len(p) * (len(p) + len(p) % 2) for p in parameters)


def run_traffic(rank):
    """As docs/scaling.md computes it: what trains under DDP; under FSDP2 every block twice and what trains besides."""
    model = build("u2a", "nf4")
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = shared(p for m in model.modules() if isinstance(m, Block) for p in m.parameters())
    collected = 2 * blocks + shared(model.parameters()) - blocks
    found = traffic(model, batch(len(LACKING) - 1, rank))
    expected = {"ddp": sum(p.nbytes for p in trained), "fsdp_collected": collected, "fsdp_summed": shared(trained)}
    assert found == expected, (found, expected)


def on_two_ranks(run):
    def joined():
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        run(distributed.get_rank())
        distributed.destroy_process_group()

    run_ranks(joined, timeout=300)


@pytest.mark.slow
def test_ddp_needs_no_unused_parameters_and_has_the_mean_of_the_ranks():
    on_two_ranks(run_ddp)


@pytest.mark.slow
@INTEGERS_SHARD
def test_fsdp2_shards_every_storage_and_has_the_mean_of_the_ranks():
    on_two_ranks(run_every_fsdp)


@pytest.mark.slow
@INTEGERS_SHARD
def test_a_step_sends_what_the_page_on_scaling_computes():
    on_two_ranks(run_traffic)
