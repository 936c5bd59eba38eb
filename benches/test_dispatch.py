"""Host time: what a block, a linear and a training step cost to call, on tensors too small to compute anything.

    pytest benches/test_dispatch.py --benchmark-only -s

Random ViT and BERT of width 32, LoRA of rank 4 on q, k, v, o, one thread, fp32; twelve blocks in a row. Arms run
interleaved and shuffled in one process with the first arm twice (A/A). PEFT's arms are transformers + PEFT as one would
write them.
"""

import contextlib
import copy

import peft
import pytest
import torch
from arms import DEVICE, hold, measure
from dry_driver import dry
from models import NO_DROPOUT, on_device
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast import PMF, U2A, JointEmbedding, LoraConfig, kernels, set_backend
from u2a_fast.encoders import from_pretrained_model

TARGETS = {
    "image": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "text": ["query", "key", "value", "attention.output.dense"],
}
ROUNDS, STEP_ROUNDS, DEPTH, RANK, CLASSES = 100, 60, 12, 4, 5


def encoders(depth=2):
    sizes = {"hidden_size": 32, "num_hidden_layers": depth, "num_attention_heads": 4, "intermediate_size": 64}
    image = ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False)
    text = BertModel(BertConfig(vocab_size=99, **NO_DROPOUT, **sizes), add_pooling_layer=False)
    return {"image": image.to(DEVICE), "text": text.to(DEVICE)}


def with_peft(model, name):
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS[name])
    return peft.get_peft_model(copy.deepcopy(model), config).train()


class Stack(torch.nn.Sequential):
    """Blocks one after the other, as a step calls them: between two calls of one alone, much leaves the caches."""

    def forward(self, x):
        for block in self:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def stacks(dtype=torch.float32):
    """Our blocks and PEFT's layers over the same weights, and their input."""
    model = encoders(DEPTH)["image"].to(dtype)
    ours = Stack(*from_pretrained_model(copy.deepcopy(model)).blocks).train()
    for block in ours:
        for linear in block.linears:
            linear.add_adapter(LoraConfig(r=RANK, lora_alpha=8))
    peft = Stack(*with_peft(model, "image").base_model.model.layers)
    return ours.to(DEVICE), peft, torch.randn(2, 5, 32, device=DEVICE, dtype=dtype)


def block_arms():
    ours, peft, x = stacks()
    x, g = x.requires_grad_(), torch.ones_like(x)
    return {"peft": lambda: peft(x).backward(g), "ours": lambda: ours(x).backward(g)}


def forward_arms():
    ours, peft, x = stacks()
    return {"peft": torch.no_grad()(lambda: peft(x)), "ours": torch.no_grad()(lambda: ours(x))}


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


@contextlib.contextmanager
def launching_arms():
    """Our blocks in bf16: on the way to an H100 that is not there (tests/support/dry_driver.py), and in ATen calls."""
    ours, _, x = stacks(torch.bfloat16)
    ours, x = ours.cpu(), x.cpu().requires_grad_()
    g = torch.ones_like(x)

    def step(backend):
        set_backend(backend)
        ours(x).backward(g)

    with dry("sm_90"):
        yield {"torch": lambda: step("torch"), "triton": lambda: step("triton")}


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


def test_launching(benchmark, one_thread):
    """What the host does for a GPU: all but the launches themselves."""
    with launching_arms() as arms:
        rows = measure(benchmark, arms, "torch", ROUNDS, warmup=20, dtype=torch.bfloat16)
    hold(benchmark, {"dispatch: Triton's block over ATen's": rows["triton"]["ratio"]})


def test_steps_of_all_methods(benchmark, one_thread):
    """No limit: PEFT's arm computes less than PMF and JointEmbedding do, and stands here as a yardstick of calls."""
    time_calls(benchmark, step_arms(), STEP_ROUNDS)


@pytest.mark.parametrize("arms", [block_arms, step_arms], ids=["block", "steps"])
def test_smoke(benchmark, arms):
    time_calls(benchmark, arms(), 2)
