"""Host time: what a block, a linear and a training step cost to call, on tensors too small to compute anything.

    pytest benches/test_dispatch.py --benchmark-only -s

Random ViT and BERT of width 32, LoRA of rank 4 on q, k, v, o, one thread, fp32. Arms run interleaved and shuffled in
one process with the first arm twice (A/A). PEFT's arms are transformers + PEFT as one would write them.
"""

import copy

import peft
import pytest
import torch
from arms import compare, report, versions
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast import PMF, U2A, JointEmbedding, LoraConfig, kernels
from u2a_fast.encoders import from_pretrained_model

BLOCK, FORWARD, LINEAR = 0.6, 0.7, 1.6  # of PEFT's layer, of its forward without gradient, of plain aten
ROUNDS, RANK, CLASSES = 300, 4, 5
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TARGETS = {
    "image": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "text": ["query", "key", "value", "attention.output.dense"],
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encoders():
    image = ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES), add_pooling_layer=False)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        "image": image,
        "text": BertModel(BertConfig(vocab_size=99, **no_dropout, **SIZES), add_pooling_layer=False),
    }


def with_peft(model, name):
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS[name])
    return peft.get_peft_model(copy.deepcopy(model), config).train()


def measured(benchmark, arms, base, limits=None, rounds=ROUNDS):
    """Ratios of medians to `base`, whose second arm is the control; those in `limits` are asserted."""
    arms = {**arms, f"{base} (A/A)": arms[base]}
    times = compare(benchmark, arms, rounds=rounds, warmup=20)
    rows = report(times, base=base, control=f"{base} (A/A)")
    benchmark.extra_info.update(rows=rows, versions=versions())
    for name, limit in (limits or {}).items():
        ratio = rows[name]["median_s"] / rows[base]["median_s"]
        assert ratio <= limit, f"{name} costs {ratio:.2f} times {base}, {limit} was promised"


def layers():
    """Our block and PEFT's layer over the same weights, and their input."""
    model = encoders()["image"]
    block = from_pretrained_model(copy.deepcopy(model)).blocks[0].train()
    for linear in block.linears:
        linear.add_adapter(LoraConfig(r=RANK, lora_alpha=8))
    return block, with_peft(model, "image").base_model.model.layers[0], torch.randn(2, 5, 32)


def test_block_forward_and_backward(benchmark):
    block, layer, x = layers()
    x, g = x.requires_grad_(), torch.ones(2, 5, 32)

    def theirs():
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).backward(g)

    measured(benchmark, {"peft": theirs, "ours": lambda: block(x).backward(g)}, "peft", {"ours": BLOCK})


def test_block_forward_without_gradient(benchmark):
    block, layer, x = layers()
    arms = {"peft": torch.no_grad()(lambda: layer(x)), "ours": torch.no_grad()(lambda: block(x))}
    measured(benchmark, arms, "peft", {"ours": FORWARD})


def test_linear_lowrank(benchmark):
    h, s = torch.randn(10, 32, requires_grad=True), torch.randn(10, RANK, requires_grad=True)
    weight, bias, b, g = (
        torch.randn(96, 32),
        torch.randn(96),
        torch.randn(96, RANK, requires_grad=True),
        torch.ones(10, 96),
    )

    def plain():
        (F.linear(h, weight, bias) + 2.0 * (s @ b.t())).backward(g)

    def ours():
        kernels.linear_lowrank(h, weight, bias, s, b, 2.0).backward(g)

    measured(benchmark, {"aten": plain, "ours": ours}, "aten", {"ours": LINEAR})


class PeftLateFusion(torch.nn.Module):
    """The plainest multimodal step with PEFT: class tokens side by side under one head."""

    def __init__(self, models):
        super().__init__()
        self.encoders = torch.nn.ModuleDict({name: with_peft(model, name) for name, model in models.items()})
        self.head = torch.nn.Linear(64, CLASSES)

    def forward(self, image, text, labels):
        rows = [self.encoders[n](**inputs).last_hidden_state[:, 0] for n, inputs in (("image", image), ("text", text))]
        return F.cross_entropy(self.head(torch.cat(rows, dim=1)), labels)


def test_steps_of_all_methods(benchmark):
    """No limit: PEFT's arm computes less than PMF and JointEmbedding do, and stands here as a yardstick of calls."""
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
    plain = PeftLateFusion(models).train()
    arms = {"peft late fusion": lambda: plain(**batch).backward()}
    arms |= {name: (lambda model=model: model(**batch).loss.backward()) for name, model in ours.items()}
    measured(benchmark, arms, "peft late fusion", rounds=60)
