"""A training step of one encoder of the 2020s under a head, forward and backward, against transformers + PEFT.

    pytest benches/test_modern_encoders.py --benchmark-only -s

ModernBERT-base, whole, 4 texts of 256 tokens, so that its windows of 64 tokens to either side cut something off, and
the same with 8 texts of 16 to 256 tokens; two layers of Qwen3-Embedding-0.6B, 8 texts of 256 tokens; DINOv3 ViT-S/16,
whole, 16 pictures of 224 pixels. Weights as drawn, vocabularies cut, which no step's time depends on. Everything is
present, and but for one case nothing is padded. LoRA of rank 8 on attention's linears: on q, k and v of ModernBERT's
joint product three adapters of ours and one of PEFT's. Both read the class token: the first row, or of Qwen3 the last
real one. We compute of the last layer what is read and PEFT computes all of it: one layer in 22, 12 or 2.
"""

import copy

import pytest
import torch
from arms import DEVICE, FAST, best, counted_flops, hold, measure
from models import even_lengths, kept_by, loss_of, on_device, step

from u2a_fast.gpu_report.modern_step import (
    TINY_CASES,
    PeftClassifier,
    dinov3,
    labelled,
    modernbert,
    ours,
    pictures,
    qwen3,
    texts,
)

ROUNDS = 7


def peft_arms(model):
    """In the dtype that is fast here; where that is bf16, under autocast as well."""
    kinds = {"bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
    kinds = kinds if torch.bfloat16 == FAST else {"fp32": (torch.float32, False)}
    return {
        f"peft {kind} {attention}": PeftClassifier(copy.deepcopy(model).to(dtype), attention, autocast).train()
        for kind, (dtype, autocast) in kinds.items()
        for attention in ("eager", "sdpa")
    }


def time_step(benchmark, model, batch, case, rounds=ROUNDS, **facts):
    modality = next(iter(batch))
    model, batch = model.eval().to(DEVICE), on_device(batch)
    arms = {"ours": ours(model, modality, FAST), **peft_arms(model)}
    steps = {name: step(arm, **batch) for name, arm in arms.items()}
    facts |= {
        "saved_bytes": {name: kept_by(arm, **batch) for name, arm in arms.items()},
        "batch": len(batch["labels"]),
        "encoders": case,
    }
    flops = counted_flops(steps["ours"])
    rows = measure(benchmark, steps, "ours", rounds, warmup=1, useful_flops=flops, flops={"ours": flops}, **facts)
    gain = best(rows, [name for name in rows if name.startswith("peft")]) / rows["ours"]["median_s"]
    hold(benchmark, {f"modern_encoders {case}: gain over the best PEFT arm": gain})


def test_modernbert(benchmark):
    time_step(
        benchmark, modernbert(), labelled("text", texts(torch.full((4,), 256))), "ModernBERT-base", real_rows=1024
    )


def test_modernbert_padded(benchmark):
    lengths = even_lengths(8, 16, 256)
    facts = {"real_rows": int(lengths.sum()), "longest_text": 256}
    time_step(benchmark, modernbert(), labelled("text", texts(lengths)), "ModernBERT-base, padded", **facts)


def test_qwen3(benchmark):
    batch = labelled("text", texts(torch.full((8,), 256)))
    time_step(benchmark, qwen3(), batch, "Qwen3-Embedding-0.6B, 2 layers", real_rows=2048)


def test_dinov3(benchmark):
    time_step(benchmark, dinov3(), labelled("image", pictures(16, 224)), "DINOv3-S", real_rows=16 * 201)


@pytest.mark.parametrize("case", TINY_CASES)
def test_smoke(benchmark, case):
    time_step(benchmark, *TINY_CASES[case](), f"tiny {case}", rounds=2)


@pytest.mark.parametrize("case", TINY_CASES)
def test_both_compute_the_same_smoke(benchmark, case):
    """The loss of PEFT's arm is ours, with adapters that are zero still and the same head."""
    model, batch = TINY_CASES[case]()
    model, batch = model.to(DEVICE), on_device(batch)
    theirs, mine = PeftClassifier(model, "sdpa").train(), ours(model.eval(), next(iter(batch)), torch.float32)
    theirs.head.load_state_dict(mine.head.state_dict())
    expected = benchmark.pedantic(lambda: loss_of(mine(**batch)), rounds=1)
    torch.testing.assert_close(theirs(**batch), expected, rtol=1e-4, atol=1e-4)
