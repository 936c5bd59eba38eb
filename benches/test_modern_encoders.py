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
import transformers
from arms import DEVICE, FAST, best, counted_flops, hold, measure
from models import ALPHA, CLASSES, RANK, even_lengths, kept_by, loss_of, on_device, step, texts, with_peft
from torch import nn
from torch.nn import functional as F

from u2a_fast import LoraConfig
from u2a_fast.methods import LateFusion

ROUNDS = 7
VOCABULARY = {"vocab_size": 20_000, "pad_token_id": 0}
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def modernbert(**sizes):
    special = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1)
    return transformers.ModernBertModel(transformers.ModernBertConfig(**VOCABULARY, **special, **sizes))


def qwen3(**sizes):
    sizes = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 3072} | sizes
    heads = {"num_key_value_heads": sizes["num_attention_heads"] // 2, "head_dim": 128} | sizes
    return transformers.Qwen3Model(transformers.Qwen3Config(**VOCABULARY, rope_theta=1e6, use_cache=False, **heads))


def dinov3(**sizes):
    """Without the chance that its positions are drawn by in training, which ours leave out."""
    options = {"num_register_tokens": 4, "pos_embed_rescale": None}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options | sizes))


class PeftClassifier(nn.Module):
    """The encoder's own forward under a head, as one writes it with transformers and PEFT.

    Args:
        attention: transformers' name of an implementation.
        autocast: compute in bf16 over the weights' own dtype.
    """

    def __init__(self, model, attention, autocast=False):
        super().__init__()
        self.encoder, self.autocast = with_peft(model, attention), autocast
        self.reads_last = model.config.model_type == "qwen3"
        self.head = nn.Linear(model.config.hidden_size, CLASSES)
        self.to(DEVICE)

    def forward(self, labels, **inputs):
        (inputs,) = inputs.values()
        if "pixel_values" in inputs:
            inputs = {"pixel_values": inputs["pixel_values"].to(self.encoder.base_model.model.dtype)}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.autocast):
            rows = self.encoder(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(dim=1) - 1 if self.reads_last else torch.zeros_like(labels)
        return F.cross_entropy(self.head(rows[torch.arange(len(rows)), last].float()), labels)


def ours(model, modality, dtype=FAST):
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA)
    return LateFusion({modality: copy.deepcopy(model).to(dtype)}, CLASSES, lora=lora).to(DEVICE).train()


def peft_arms(model):
    """In the dtype that is fast here; where that is bf16, under autocast as well."""
    kinds = {"bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
    kinds = kinds if torch.bfloat16 == FAST else {"fp32": (torch.float32, False)}
    return {
        f"peft {kind} {attention}": PeftClassifier(copy.deepcopy(model).to(dtype), attention, autocast).train()
        for kind, (dtype, autocast) in kinds.items()
        for attention in ("eager", "sdpa")
    }


def labelled(modality, inputs):
    size = len(next(iter(inputs.values())))
    return on_device({modality: inputs, "labels": torch.arange(size) % CLASSES})


def pictures(count, side):
    return labelled("image", {"pixel_values": torch.randn(count, 3, side, side)})


def time_step(benchmark, model, batch, case, rounds=ROUNDS, **facts):
    modality = next(iter(batch))
    model = model.eval().to(DEVICE)
    arms = {"ours": ours(model, modality), **peft_arms(model)}
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
    time_step(benchmark, dinov3(), pictures(16, 224), "DINOv3-S", real_rows=16 * 201)


TINY_CASES = {
    "modernbert": lambda: (modernbert(**TINY, local_attention=4), labelled("text", texts(even_lengths(4, 2, 9)))),
    "qwen3": lambda: (qwen3(**TINY, head_dim=16), labelled("text", texts(even_lengths(4, 2, 9)))),
    "dinov3": lambda: (dinov3(**TINY, image_size=32), pictures(4, 32)),
}


@pytest.mark.parametrize("case", TINY_CASES)
def test_smoke(benchmark, case):
    time_step(benchmark, *TINY_CASES[case](), f"tiny {case}", rounds=2)


@pytest.mark.parametrize("case", TINY_CASES)
def test_both_compute_the_same_smoke(benchmark, case):
    """The loss of PEFT's arm is ours, with adapters that are zero still and the same head."""
    model, batch = TINY_CASES[case]()
    theirs, mine = PeftClassifier(model, "sdpa").train(), ours(model.eval(), next(iter(batch)), torch.float32)
    theirs.head.load_state_dict(mine.head.state_dict())
    expected = benchmark.pedantic(lambda: loss_of(mine(**batch)), rounds=1)
    torch.testing.assert_close(theirs(**batch), expected, rtol=1e-4, atol=1e-4)
