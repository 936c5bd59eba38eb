"""One block with LoRA, forward and backward: how much of what the machine multiplies at most is useful work.

    pytest benches/test_block.py --benchmark-only -s

A ViT-B block over 8 x 197 rows and a BERT-base block over 16 x 96, rank 8 on q, k, v, o. Useful are the products of a
forward, their dX, and the low-rank ones; attention counts with a forward and twice as much backward, and nothing that
is computed again. The peak is a frozen product of the same rows, timed between the arms.
"""

import copy

import pytest
import torch
from arms import DEVICE, FAST, hold, measure
from models import ALPHA, RANK, tiny_encoders, vit_and_bert, with_peft

from u2a_fast import LoraConfig
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.build import family_of
from u2a_fast.memory import saved_bytes

ROUNDS = 15
CASES = {"ViT-B": ("image", 8, 197), "BERT-base": ("text", 16, 96)}


def useful_flops(config, samples, tokens, rank):
    rows, d, hidden = samples * tokens, config.hidden_size, config.intermediate_size
    frozen = 2 * 2 * rows * (4 * d * d + 2 * d * hidden)  # forward, and dX
    low_rank = 3 * 2 * rows * 4 * rank * 2 * d  # S and its product; G and its product; dA and dB
    return frozen + low_rank + 3 * 4 * samples * tokens**2 * d


def blocks(model, name):
    """Ours and PEFT's layer over the same weights."""
    block = from_pretrained_model(copy.deepcopy(model)).blocks[0].to(DEVICE).train()
    for linear in block.linears:
        linear.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA))
    made = {"ours": block}
    for attention in ("eager", "sdpa"):
        theirs = with_peft(model, attention).base_model.model
        made[f"peft {attention}"] = theirs.get_submodule(family_of(theirs).layers)[0].train()
    return made


def time_block(benchmark, model, name, samples, tokens, rounds, **facts):
    x = torch.randn(samples, tokens, model.config.hidden_size, device=DEVICE, dtype=FAST, requires_grad=True)
    dy, arms = torch.randn_like(x), blocks(model.to(FAST), name)
    expected = arms["ours"](x).float()
    assert all((block(x).float() - expected).norm() < 0.02 * expected.norm() for block in arms.values())
    flops = useful_flops(model.config, samples, tokens, RANK)
    kept = {n: saved_bytes(lambda block=block: block(x), (*block.parameters(), x)) for n, block in arms.items()}
    steps = {n: (lambda block=block: block(x).backward(dy)) for n, block in arms.items()}
    facts |= {"saved_bytes": kept, "real_rows": samples * tokens, "rank": RANK}
    return measure(benchmark, steps, "ours", rounds, useful_flops=flops, **facts)


@pytest.mark.parametrize("case", CASES)
def test_block(benchmark, case):
    name, samples, tokens = CASES[case]
    rows = time_block(benchmark, vit_and_bert(1)[name], name, samples, tokens, ROUNDS, encoders=case)
    hold(benchmark, {f"block {case}: fraction of the GEMM peak": rows["ours"]["fraction_of_peak"]})


@pytest.mark.parametrize("name", ["image", "text"])
def test_smoke(benchmark, name):
    time_block(benchmark, tiny_encoders(1)[name], name, 2, 5, 2)
