"""Host time: what a block, a linear and a training step cost to call, on tensors too small to compute anything.

    pytest benches/test_dispatch.py --benchmark-only -s

Random ViT and BERT of width 32, LoRA of rank 4 on q, k, v, o, one thread, fp32. Arms run interleaved and shuffled in
one process with the first arm twice (A/A). PEFT's arms are transformers + PEFT as one would write them.
"""

import copy

import peft
import pytest
import torch
from arms import DEVICE, hold, measure
from models import NO_DROPOUT, TARGETS, on_device
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast import PMF, U2A, JointEmbedding, LoraConfig, kernels
from u2a_fast.encoders import from_pretrained_model

ROUNDS, STEP_ROUNDS, RANK, CLASSES = 300, 60, 4, 5
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def encoders():
    image = ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES), add_pooling_layer=False)
    text = BertModel(BertConfig(vocab_size=99, **NO_DROPOUT, **SIZES), add_pooling_layer=False)
    return {"image": image.to(DEVICE), "text": text.to(DEVICE)}


def with_peft(model, name):
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS[name])
    return peft.get_peft_model(copy.deepcopy(model), config).train()


def layers():
    """Our block and PEFT's layer over the same weights, and their input."""
    model = encoders()["image"]
    block = from_pretrained_model(copy.deepcopy(model)).blocks[0].train()
    for linear in block.linears:
        linear.add_adapter(LoraConfig(r=RANK, lora_alpha=8))
    layer = with_peft(model, "image").base_model.model.layers[0]
    return block.to(DEVICE), layer, torch.randn(2, 5, 32, device=DEVICE)


def first_of(y):
    return y[0] if isinstance(y, tuple) else y


def block_arms():
    block, layer, x = layers()
    x, g = x.requires_grad_(), torch.ones_like(x)
    return {"peft": lambda: first_of(layer(x)).backward(g), "ours": lambda: block(x).backward(g)}


def forward_arms():
    block, layer, x = layers()
    return {"peft": torch.no_grad()(lambda: layer(x)), "ours": torch.no_grad()(lambda: block(x))}


def linear_arms():
    h, s, b = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((10, 32), (10, RANK), (96, RANK)))
    weight, bias, g = (torch.randn(*shape, device=DEVICE) for shape in ((96, 32), (96,), (10, 96)))
    return {
        "aten": lambda: (F.linear(h, weight, bias) + 2.0 * (s @ b.t())).backward(g),
        "ours": lambda: kernels.linear_lowrank(h, weight, bias, s, b, 2.0).backward(g),
    }


class PeftLateFusion(torch.nn.Module):
    """The plainest multimodal step with PEFT: class tokens side by side under one head."""

    def __init__(self, models):
        super().__init__()
        self.encoders = torch.nn.ModuleDict({name: with_peft(model, name) for name, model in models.items()})
        self.head = torch.nn.Linear(64, CLASSES)

    def forward(self, image, text, labels):
        rows = [self.encoders[n](**inputs).last_hidden_state[:, 0] for n, inputs in (("image", image), ("text", text))]
        return F.cross_entropy(self.head(torch.cat(rows, dim=1)), labels)


def step_arms():
    lora, models = LoraConfig(r=RANK, lora_alpha=8), encoders()
    ours = {
        "u2a": U2A(copy.deepcopy(models), CLASSES, lora=lora, modality_dropout=0.0),
        "pmf": PMF(copy.deepcopy(models), CLASSES, fusion_layers=1),
        "joint_embedding": JointEmbedding(copy.deepcopy(models), CLASSES, tuning=lora),
    }
    batch = {
        "image": {"pixel_values": torch.randn(2, 3, 16, 16)},
        "text": {"input_ids": torch.randint(5, 99, (2, 5))},
        "labels": torch.tensor([0, 1]),
    }
    ours = {name: model.to(DEVICE) for name, model in ours.items()}
    batch, plain = on_device(batch), PeftLateFusion(models).to(DEVICE).train()
    arms = {"peft late fusion": lambda: plain(**batch).backward()}
    return arms | {n: (lambda model=model: model(**batch).loss.backward()) for n, model in ours.items()}


QUESTIONS = {
    "block over PEFT's layer": block_arms,
    "block without gradient over PEFT's layer": forward_arms,
    "linear_lowrank over aten": linear_arms,
}


def time_calls(benchmark, arms, rounds):
    return measure(benchmark, arms, next(iter(arms)), rounds, warmup=20, dtype=torch.float32)


@pytest.mark.parametrize("question", QUESTIONS)
def test_dispatch(benchmark, one_thread, question):
    rows = time_calls(benchmark, QUESTIONS[question](), ROUNDS)
    hold(benchmark, {f"dispatch: {question}": rows["ours"]["ratio"]})


def test_steps_of_all_methods(benchmark, one_thread):
    """No limit: PEFT's arm computes less than PMF and JointEmbedding do, and stands here as a yardstick of calls."""
    time_calls(benchmark, step_arms(), STEP_ROUNDS)


@pytest.mark.parametrize("arms", [block_arms, step_arms], ids=["block", "steps"])
def test_smoke(benchmark, arms):
    time_calls(benchmark, arms(), 2)
