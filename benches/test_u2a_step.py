"""One training step of U2A on the emoji encoders: absent rows packed away, computed anyway, and as PEFT computes them.

    pytest benches/test_u2a_step.py --benchmark-only -s

Arms run interleaved and shuffled in one process; `packed (A/A)` is the first arm again, and a ratio that is not
larger than its noise is reported as no result. Flops and saved bytes are counted, not timed.
"""

import pytest
import torch
from arms import compare, counted_flops, report, versions

from u2a_fast import U2A, LoraConfig, MissingPattern
from u2a_fast.data import dinov2_folder, minilm_folder
from u2a_fast.encoders import load
from u2a_fast.memory import saved_bytes

BATCH, RATE, TOKENS, CLASSES = 32, 0.7, 16, 8
ROUNDS = 15


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "image": {"pixel_values": torch.randn(BATCH, 3, 112, 112, generator=generator)},
        "text": {
            "input_ids": torch.randint(1000, 20000, (BATCH, TOKENS), generator=generator),
            "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        },
        "modality_mask": MissingPattern(rate=RATE, kind="both").table(BATCH, ("image", "text")),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=generator),
    }


def encoders(**options):
    sources = {"image": dinov2_folder(image_size=112), "text": minilm_folder()}
    return {name: load(str(folder), name, dtype=torch.bfloat16, **options) for name, folder in sources.items()}


def ours(absent):
    model = U2A(encoders(), CLASSES, lora=LoraConfig(r=8, lora_alpha=16), modality_dropout=0.0, absent=absent).train()
    return lambda batch: model(**batch).loss


class PeftU2A(torch.nn.Module):
    """The same method as one would write it with transformers and PEFT: every row runs, absent ones are replaced."""

    def __init__(self, attention):
        super().__init__()
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        targets = {
            "image": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "text": ["query", "key", "value", "attention.output.dense"],
        }
        self.encoders, self.mask_tokens = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        for name, model in encoders(attn_implementation=attention).items():
            config = PeftConfig(r=8, lora_alpha=16, target_modules=targets[name])
            self.encoders[name] = get_peft_model(model.eval(), config, autocast_adapter_dtype=False)
            self.mask_tokens[name] = torch.nn.Parameter(torch.randn(1, 1, model.config.hidden_size) * 0.02)
        self.head = torch.nn.Linear(384, CLASSES)

    def read(self, name, inputs):
        model = self.encoders[name].base_model.model
        token = self.mask_tokens[name].to(torch.bfloat16).expand(BATCH, -1, -1)
        if name == "image":
            rows = torch.cat([model.embeddings(inputs["pixel_values"].bfloat16()), token], dim=1)
            hidden = model.layernorm(model.encoder(rows).last_hidden_state)
        else:
            rows = torch.cat([model.embeddings(inputs["input_ids"]), token], dim=1)
            hidden = model.encoder(rows).last_hidden_state
        return hidden[:, 0].float(), hidden[:, -1].float()

    def forward(self, batch):
        (image, to_text), (text, to_image) = (self.read(name, batch[name]) for name in ("image", "text"))
        has_image, has_text = batch["modality_mask"].unsqueeze(2).unbind(1)
        fused = torch.where(has_image, image, to_image) + torch.where(has_text, text, to_text)
        both = (has_image & has_text).float()
        pairs = both.sum().clamp(min=1) * image.shape[1]
        align = ((to_text - text.detach()).square() * both).sum() / pairs
        align = align + ((to_image - image.detach()).square() * both).sum() / pairs
        return torch.nn.functional.cross_entropy(self.head(fused), batch["labels"]) + 0.2 * align


def test_u2a_step(benchmark, batch):
    losses = {
        "packed": ours("pack"),
        "where": ours("where"),
        "peft eager": PeftU2A("eager"),
        "peft sdpa": PeftU2A("sdpa"),
    }
    losses["packed (A/A)"] = losses["packed"]
    steps = {name: (lambda loss=loss: loss(batch).backward()) for name, loss in losses.items()}
    times = compare(benchmark, steps, rounds=ROUNDS)
    rows = report(times, base="packed", control="packed (A/A)")
    benchmark.extra_info.update(
        rows=rows,
        flops={name: counted_flops(step) for name, step in steps.items()},
        saved_bytes={name: saved_bytes(lambda loss=loss: loss(batch)) for name, loss in losses.items()},
        versions=versions(),
    )
    ratio = rows["where"]["ratio"]
    assert ratio is not None and ratio >= 1.4, f"packed is {ratio} times as fast as where, 1.4 was promised"
