"""Bytes kept for backward by a training step: U2A's against transformers + PEFT, with and without checkpointing.

    pytest benches/test_saved_bytes.py --benchmark-only -s

Counted through saved_tensors_hooks, each storage once, parameters not; nothing is timed but the count itself. LoRA of
rank 8 on q, k, v, o, all samples present, SDPA attention and no dropout in PEFT's arm. Under autocast PEFT also keeps
a bf16 copy of every frozen weight, whatever the batch; "activations alone", the difference of two batches, is without.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from u2a_fast import U2A, LoraConfig
from u2a_fast.memory import saved_bytes

WITHOUT, WITH_CHECKPOINTING = 0.60, 0.20
ROLES = {"image": r".*(q_proj|k_proj|v_proj|o_proj)", "text": r".*(query|key|value|attention\.output\.dense)"}


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


@pytest.mark.parametrize("sizes, batch", [(small, 32), (base, 8)], ids=["DINOv2-S + MiniLM", "ViT-B + BERT-base"])
def test_saved_bytes(benchmark, sizes, batch):
    models, length = sizes()
    side = models["image"].config.image_size
    ways = {
        "PEFT, autocast": kept_by_peft,
        "U2A, autocast": lambda m, i: kept_by_us(m, i, True, False),
        "U2A, bf16 encoders": lambda m, i: kept_by_us(m, i, False, False),
        "U2A, autocast, checkpointing": lambda m, i: kept_by_us(m, i, True, True),
        "U2A, bf16, checkpointing": lambda m, i: kept_by_us(m, i, False, True),
    }

    def count():
        kept = {}
        for rows in (batch, batch // 2):
            text = {"input_ids": torch.randint(5, 1000, (rows, length))}
            inputs = {"image": {"pixel_values": torch.randn(rows, 3, side, side)}, "text": text}
            kept[rows] = {name: way(models, inputs) for name, way in ways.items()}
        return kept

    kept = benchmark.pedantic(count, rounds=1)
    activations = {name: 2 * (kept[batch][name] - kept[batch // 2][name]) for name in ways}
    first = next(iter(ways))
    print(f"\nMB kept for backward, batch {batch}")
    for name in ways:
        ratio, alone = kept[batch][name] / kept[batch][first], activations[name] / activations[first]
        print(f"  {name:30s} {kept[batch][name] / 1e6:7.1f}  {ratio:.3f}x;  activations alone {alone:.3f}x")
        benchmark.extra_info[name] = {"bytes": kept[batch][name], "ratio": ratio, "activations_ratio": alone}
        limit = WITH_CHECKPOINTING if "checkpointing" in name else WITHOUT
        assert name == first or ratio <= limit
