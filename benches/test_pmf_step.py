"""PMF: one fusion layer over the plain frozen layers it stands on, and a training step against the plain way.

    pytest benches/test_pmf_step.py --benchmark-only -s

The layer: ViT-B and BERT-base, 197 tokens each, batch 8, forward only, one thread; "whole layers" runs each stage as a
whole layer, as the official code does. The step: LAYERS layers of which the last two fuse, batch 16, texts of 8 to 128
tokens; "reference" is `u2a_fast.reference`, whole layers in plain PyTorch, and "frozen" the encoders' forward alone.
"""

import copy
import functools

import pytest
import torch
from arms import DEVICE, FAST, counted_flops, hold, measure, name_of
from models import CLASSES, even_lengths, kept_by, make_batch, presence_table, step, tiny_encoders, vit_and_bert

from u2a_fast import PMF
from u2a_fast.layout import dense
from u2a_fast.reference import ReferencePMF

BATCH, TOKENS, ROUNDS = 8, 197, 15
LAYERS, STEP_BATCH, STEP_ROUNDS = 3, 16, 7


def whole_layers(model, blocks, tokens):
    """As the official code does it: every layer twice, over all rows."""
    parts, read, batch = model.layers[0], {}, len(tokens[0])
    for (name, part), block, x in zip(parts.items(), blocks, tokens, strict=True):
        prompts = torch.cat([part.query_context_prompt, part.query_prompt]).to(x.dtype)
        read[name] = block(torch.cat([x, prompts.expand(batch, -1, -1)], dim=1))[:, -4:].float()
    fused = []
    for (name, part), block, x in zip(parts.items(), blocks, tokens, strict=True):
        said = [parts[source].message(name, y).to(x.dtype) for source, y in read.items() if source != name]
        context = part.fusion_context_prompt.to(x.dtype).expand(batch, -1, -1)
        fused.append(block(torch.cat([x, context, *said], dim=1))[:, : x.shape[1]])
    return fused


def time_layer(benchmark, models, dtype, rounds, batch=BATCH, tokens=TOKENS):
    model = PMF({name: encoder.to(dtype) for name, encoder in models.items()}, num_labels=101, fusion_layers=1)
    model = model.to(DEVICE).eval()
    blocks = [encoder.blocks[0] for encoder in model.encoders.values()]
    x = [torch.randn(batch, tokens, encoder.width).to(DEVICE, dtype) for encoder in model.encoders.values()]
    everyone, layouts = [torch.arange(batch, device=DEVICE)] * 2, [functools.partial(dense, batch, tokens)] * 2
    arms = {
        "plain": lambda: [block(rows) for block, rows in zip(blocks, x, strict=True)],
        "fusion layer": lambda: model.layers[0](blocks, everyone, layouts, [None, None], batch, *x),
        "whole layers": lambda: whole_layers(model, blocks, x),
    }
    arms = {name: torch.no_grad()(arm) for name, arm in arms.items()}
    scale = arms["plain"]()[0].float().std()
    for ours, theirs in zip(arms["fusion layer"](), arms["whole layers"](), strict=True):
        assert (ours - theirs).abs().max() < 0.05 * scale
    facts = {"flops": {name: counted_flops(arm) for name, arm in arms.items()}, "real_rows": 2 * batch * tokens}
    return measure(benchmark, arms, "plain", rounds, dtype=dtype, **facts)


@pytest.mark.parametrize("dtype", sorted({torch.float32, FAST}, key=str), ids=name_of)
def test_pmf_layer(benchmark, one_thread, dtype):
    rows = time_layer(benchmark, vit_and_bert(1), dtype, ROUNDS)
    hold(benchmark, {f"pmf layer over plain layers, {name_of(dtype)}": rows["fusion layer"]["ratio"]})


def time_step(benchmark, models, batch, rounds, **facts):
    inputs = {name: batch[name] for name in models}
    models = {name: model.to(FAST) for name, model in models.items()}
    ours = PMF(copy.deepcopy(models), CLASSES).to(DEVICE).train()
    reference = ReferencePMF(copy.deepcopy(models), CLASSES).to(DEVICE).train()

    @torch.no_grad()
    def frozen():
        for name, encoder in ours.encoders.items():
            encoder(**inputs[name])

    trained = {
        "ours": (ours, (), batch),
        "reference": (reference, (inputs, batch["modality_mask"], batch["labels"]), {}),
    }
    arms = {"frozen": frozen, **{name: step(model, *a, **k) for name, (model, a, k) in trained.items()}}
    flops = {name: counted_flops(arm) for name, arm in arms.items()}
    facts |= {"flops": flops, "saved_bytes": {name: kept_by(model, *a, **k) for name, (model, a, k) in trained.items()}}
    return measure(benchmark, arms, "ours", rounds, warmup=1, useful_flops=flops["ours"], **facts)


@pytest.mark.parametrize("missing", [0.7, 0.0], ids=["70% missing", "full presence"])
def test_pmf_step(benchmark, missing):
    batch = make_batch(even_lengths(STEP_BATCH, 8, 128), presence_table(STEP_BATCH, missing))
    facts = {"missing_rate": missing, "encoders": f"ViT-B + BERT-base, {LAYERS} layers", "longest_text": 128}
    rows = time_step(benchmark, vit_and_bert(LAYERS), batch, STEP_ROUNDS, **facts)
    gain = rows["reference"]["median_s"] / rows["ours"]["median_s"]
    hold(benchmark, {f"pmf_step, {missing:.0%} missing: gain over whole layers": gain})


def test_layer_smoke(benchmark, one_thread):
    time_layer(benchmark, tiny_encoders(1), torch.float32, 2, batch=2, tokens=5)


def test_smoke(benchmark):
    time_step(benchmark, tiny_encoders(), make_batch(even_lengths(4, 2, 9), presence_table(4, 0.5), 32), 2)
