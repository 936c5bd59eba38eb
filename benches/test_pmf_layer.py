"""One fusion layer of PMF against the plain frozen layers it stands on, and against both stages run as whole layers.

    pytest benches/test_pmf_layer.py --benchmark-only -s

ViT-B and BERT-base, 197 tokens each, batch 8, forward only, one thread. Arms run interleaved and shuffled in one
process; `plain (A/A)` is the first arm again, and a ratio that is not larger than its noise is reported as no result.
"""

import functools

import pytest
import torch
from arms import compare, report, versions
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast.layout import dense
from u2a_fast.methods import PMF

BATCH, TOKENS, WIDTH, LIMIT = 8, 197, 768, 1.25
ROUNDS = 15


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole_layers(model, blocks, tokens):
    """As the official code does it: every layer twice, over all rows."""
    parts, read = model.layers[0], {}
    for (name, part), block, x in zip(parts.items(), blocks, tokens, strict=True):
        prompts = torch.cat([part.query_context_prompt, part.query_prompt]).to(x.dtype)
        read[name] = block(torch.cat([x, prompts.expand(BATCH, -1, -1)], dim=1))[:, -4:].float()
    fused = []
    for (name, part), block, x in zip(parts.items(), blocks, tokens, strict=True):
        said = [parts[source].message(name, y).to(x.dtype) for source, y in read.items() if source != name]
        context = part.fusion_context_prompt.to(x.dtype).expand(BATCH, -1, -1)
        fused.append(block(torch.cat([x, context, *said], dim=1))[:, :TOKENS])
    return fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_pmf_layer(benchmark, one_thread, dtype):
    torch.manual_seed(0)
    image = ViTModel(ViTConfig(num_hidden_layers=1), add_pooling_layer=False)
    text = BertModel(BertConfig(num_hidden_layers=1), add_pooling_layer=False)
    model = PMF({"image": image.to(dtype), "text": text.to(dtype)}, num_labels=101, fusion_layers=1).eval()
    blocks = [encoder.blocks[0] for encoder in model.encoders.values()]
    tokens = [torch.randn(BATCH, TOKENS, WIDTH).to(dtype) for _ in blocks]
    everyone, layouts = [torch.arange(BATCH)] * 2, [functools.partial(dense, BATCH, TOKENS)] * 2

    @torch.no_grad()
    def plain():
        return [block(x) for block, x in zip(blocks, tokens, strict=True)]

    @torch.no_grad()
    def fusion():
        return model.layers[0](blocks, everyone, layouts, [None, None], BATCH, *tokens)

    @torch.no_grad()
    def whole():
        return whole_layers(model, blocks, tokens)

    scale = plain()[0].float().std()
    assert all((a - b).abs().max() < 0.05 * scale for a, b in zip(fusion(), whole(), strict=True))
    arms = {"plain": plain, "plain (A/A)": plain, "fusion layer": fusion, "whole layers": whole}
    times = compare(benchmark, arms, rounds=ROUNDS)
    rows = report(times, base="plain", control="plain (A/A)")
    benchmark.extra_info.update(rows=rows, versions=versions())
    ratio = rows["fusion layer"]["median_s"] / rows["plain"]["median_s"]
    assert ratio <= LIMIT, f"a fusion layer costs {ratio:.2f} plain layers, {LIMIT} was promised"
