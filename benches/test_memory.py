"""Bytes kept for backward by a training step: U2A's against transformers + PEFT, with and without checkpointing.

    pytest benches/test_memory.py --benchmark-only -s

Counted through saved_tensors_hooks, each storage once, parameters not; nothing is timed but the count itself. LoRA of
rank 8 on q, k, v, o, all samples present, SDPA attention and no dropout in PEFT's arm. Under autocast PEFT also keeps
a bf16 copy of every frozen weight, whatever the batch; "activations alone", the difference of two batches, is without.
"""

import copy

import pytest
import torch
from arms import hold, machine
from models import TINY
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from u2a_fast import U2A, LoraConfig
from u2a_fast.memory import saved_bytes

ROLES = {
    "image": r".*(q_proj|k_proj|v_proj|o_proj|query|key|value|attention\.output\.dense)",
    "text": r".*(query|key|value|attention\.output\.dense)",
}


def bert(**sizes):
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return BertModel(config, add_pooling_layer=False)


def small():
    """DINOv2-S on 65 tokens, MiniLM on 16."""
    sizes = {"hidden_size": 384, "num_attention_heads": 6}
    image = Dinov2Model(Dinov2Config(num_hidden_layers=12, image_size=112, patch_size=14, **sizes))
    return {"image": image, "text": bert(num_hidden_layers=6, intermediate_size=1536, **sizes)}, 16


def base():
    """ViT-B on 197 tokens, BERT-base on 64."""
    return {"image": ViTModel(ViTConfig(), add_pooling_layer=False), "text": bert()}, 64


def kept_by_peft(models, inputs):
    import peft

    adapted = nn.ModuleDict(
        {
            name: peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, target_modules=ROLES[name]))
            for name, model in models.items()
        }
    ).train()
    head, labels = nn.Linear(models["text"].config.hidden_size, 8), torch.zeros(len(inputs["text"]["input_ids"])).long()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            rows = [adapted[name](**inputs[name]).last_hidden_state[:, 0] for name in adapted]
            return F.cross_entropy(head(rows[0] + rows[1]), labels)

    return saved_bytes(step, [*adapted.parameters(), *head.parameters()])


def kept_by_us(models, inputs, autocast, checkpointing):
    encoders = {
        name: copy.deepcopy(model) if autocast else copy.deepcopy(model).bfloat16() for name, model in models.items()
    }
    model = U2A(encoders, num_labels=8, lora=LoraConfig(r=8), modality_dropout=0.0).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    labels = torch.zeros(len(inputs["text"]["input_ids"])).long()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**inputs, labels=labels).loss

    return saved_bytes(step, model.parameters())


def tiny():
    image = ViTModel(ViTConfig(num_hidden_layers=2, image_size=32, **TINY), add_pooling_layer=False)
    return {"image": image, "text": bert(num_hidden_layers=2, **TINY)}, 8


WAYS = {
    "PEFT, autocast": kept_by_peft,
    "U2A, autocast": lambda m, i: kept_by_us(m, i, True, False),
    "U2A, bf16 encoders": lambda m, i: kept_by_us(m, i, False, False),
    "U2A, autocast, checkpointing": lambda m, i: kept_by_us(m, i, True, True),
    "U2A, bf16, checkpointing": lambda m, i: kept_by_us(m, i, False, True),
}
PEFT = next(iter(WAYS))


def count(sizes, batch):
    """Bytes by number of samples, `batch` and half of it, and by way."""
    models, length = sizes()
    side, kept = models["image"].config.image_size, {}
    for rows in (batch, batch // 2):
        text = {"input_ids": torch.randint(5, 1000, (rows, length))}
        inputs = {"image": {"pixel_values": torch.randn(rows, 3, side, side)}, "text": text}
        kept[rows] = {name: way(models, inputs) for name, way in WAYS.items()}
    return kept


def count_bytes(benchmark, sizes, batch, **facts):
    kept = benchmark.pedantic(count, args=(sizes, batch), rounds=1)
    activations = {name: 2 * (kept[batch][name] - kept[batch // 2][name]) for name in WAYS}
    ratios = {name: kept[batch][name] / kept[batch][PEFT] for name in WAYS}
    print(f"\nMB kept for backward, batch {batch}")
    for name in WAYS:
        alone = activations[name] / activations[PEFT]
        print(f"  {name:30s} {kept[batch][name] / 1e6:7.1f}  {ratios[name]:.3f}x;  activations alone {alone:.3f}x")
    facts |= {"saved_bytes": kept[batch], "activation_bytes": activations, "batch": batch, "base": PEFT}
    benchmark.extra_info.update(machine=machine(), dtype="bf16", **facts)
    return ratios


CASES = {"DINOv2-S + MiniLM": (small, 32), "ViT-B + BERT-base": (base, 8)}


@pytest.mark.parametrize("case", CASES)
def test_saved_bytes(benchmark, case):
    ratios = count_bytes(benchmark, *CASES[case], encoders=case)
    plain, checkpointed = ([r for n, r in ratios.items() if n != PEFT and ("check" in n) == c] for c in (False, True))
    worst = {"saved bytes": max(plain), "saved bytes with checkpointing": max(checkpointed)}
    hold(benchmark, {f"memory: {what} over PEFT": ratio for what, ratio in worst.items()})


def test_smoke(benchmark):
    count_bytes(benchmark, tiny, 4)
