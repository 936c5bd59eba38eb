"""A training step of JointEmbedding, forward and backward, against the same in plain PyTorch.

    pytest benches/test_joint_embedding_step.py --benchmark-only -s

ViT-B/16 at 224 + BERT-base, cut to LAYERS layers, batch 16, texts of 8 to 128 tokens, tuned by LoRA and by biases.
"reference" is `u2a_fast.reference` (present samples only, padding computed); no public code of the method exists, so
nothing was promised against it.
"""

import copy

import pytest
from arms import DEVICE, FAST, counted_flops, hold, measure
from models import (
    ALPHA,
    CLASSES,
    RANK,
    even_lengths,
    kept_by,
    make_batch,
    presence_table,
    step,
    tiny_encoders,
    vit_and_bert,
)

from u2a_fast import JointEmbedding, LoraConfig
from u2a_fast.reference import ReferenceJointEmbedding

LAYERS, BATCH, ROUNDS = 3, 16, 7
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ("q", "k", "v", "o")}
TUNINGS = {"lora": (LoraConfig(**LORA), LORA), "bitfit": ("bitfit", "bitfit")}


def time_step(benchmark, models, batch, tuning, rounds, **facts):
    inputs = {name: batch[name] for name in models}
    models = {name: model.to(FAST) for name, model in models.items()}
    ours_tuning, reference_tuning = TUNINGS[tuning]
    ours = JointEmbedding(copy.deepcopy(models), CLASSES, tuning=ours_tuning).to(DEVICE).train()
    reference = ReferenceJointEmbedding(copy.deepcopy(models), CLASSES, tuning=reference_tuning).to(DEVICE).train()
    trained = {
        "ours": (ours, (), batch),
        "reference": (reference, (inputs, batch["modality_mask"], batch["labels"]), {}),
    }
    arms = {name: step(model, *a, **k) for name, (model, a, k) in trained.items()}
    flops = {name: counted_flops(arm) for name, arm in arms.items()}
    facts |= {"flops": flops, "saved_bytes": {name: kept_by(model, *a, **k) for name, (model, a, k) in trained.items()}}
    return measure(benchmark, arms, "ours", rounds, warmup=1, useful_flops=flops["ours"], tuning=tuning, **facts)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("missing", [0.7, 0.0], ids=["70% missing", "full presence"])
def test_joint_embedding_step(benchmark, missing, tuning):
    batch = make_batch(even_lengths(BATCH, 8, 128), presence_table(BATCH, missing))
    facts = {"missing_rate": missing, "encoders": f"ViT-B + BERT-base, {LAYERS} layers", "longest_text": 128}
    rows = time_step(benchmark, vit_and_bert(LAYERS), batch, tuning, ROUNDS, **facts)
    gain = rows["reference"]["median_s"] / rows["ours"]["median_s"]
    hold(benchmark, {f"joint_embedding_step {tuning}, {missing:.0%} missing: gain over plain PyTorch": gain})


@pytest.mark.parametrize("tuning", TUNINGS)
def test_smoke(benchmark, tuning):
    time_step(benchmark, tiny_encoders(), make_batch(even_lengths(4, 2, 9), presence_table(4, 0.5), 32), tuning, 2)
