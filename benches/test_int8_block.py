"""A ViT-B block forward over 8 x 197 rows: bf16 weights, int8 weights both ways, and bitsandbytes' Linear8bitLt.

    pytest benches/test_int8_block.py --benchmark-only -s

All arms are the same block, so that only the linears differ. They run interleaved and shuffled in one process;
`bf16 (A/A)` is the first arm again, and a ratio that is not larger than its noise is reported as no result.
"""

import pytest
import torch
from arms import compare, report, versions
from torch import nn
from transformers import ViTConfig, ViTModel

from u2a_fast.doctor import int8_path
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder

BATCH, TOKENS, WIDTH = 8, 197, 768
OVER_BF16, OVER_BITSANDBYTES = 1.3, 1.5
ROUNDS = 15


class BitsAndBytesLinear(nn.Module):
    """Linear8bitLt where the block expects a linear of ours."""

    lora_before_dropout, takes_quantized = None, False

    def __init__(self, linear):
        super().__init__()
        import bitsandbytes as bnb

        rows, columns = linear.weight.shape
        self.linear = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False)
        self.linear.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        self.linear.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
        self.linear.to("cpu")

    def forward(self, x):
        return self.linear(x)

    def forward_projected(self, x, s):
        return self(x)


def block(mode=None, bitsandbytes=False):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(num_hidden_layers=1), add_pooling_layer=False).bfloat16()
    built = quantize_encoder(from_pretrained_model(model), mode).blocks[0].eval()
    if bitsandbytes:
        for name in ("qkv", "o", "fc1", "fc2"):
            setattr(built, name, BitsAndBytesLinear(getattr(built, name)))
    return built.eval()


def overlap(one, other):
    """Whether two quartile ranges have a time in common."""
    return one[0] <= other[1] and other[0] <= one[1]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_int8_block(benchmark, threads):
    x = torch.randn(BATCH, TOKENS, WIDTH).bfloat16()
    plain, w8a16, w8a8, bnb = block(), block("int8"), block("int8_w8a8"), block(bitsandbytes=True)

    def arm(module):
        def run():
            with torch.no_grad():
                return module(x)

        return run

    arms = {"bf16": arm(plain), "bf16 (A/A)": arm(plain), "int8": arm(w8a16), "int8_w8a8": arm(w8a8)}
    arms["Linear8bitLt"] = arm(bnb)
    expected = arms["bf16"]().float()
    assert all((run().float() - expected).norm() < 0.05 * expected.norm() for run in arms.values())
    rows = report(compare(benchmark, arms, rounds=ROUNDS), base="bf16", control="bf16 (A/A)")
    print(int8_path())
    benchmark.extra_info.update(rows=rows, versions=versions(), threads=threads)
    quartiles = {name: row["quartiles_s"] for name, row in rows.items()}
    if rows["int8_w8a8"]["ratio"] is None or overlap(quartiles["bf16"], quartiles["int8_w8a8"]):
        pytest.skip("no result: the noise is as large as the effect")
    seconds = {name: row["median_s"] for name, row in rows.items()}
    over_bf16 = seconds["bf16"] / seconds["int8_w8a8"]
    over_bitsandbytes = seconds["Linear8bitLt"] / seconds["int8_w8a8"]
    print(f"int8_w8a8: {over_bf16:.2f}x the bf16 rate, {over_bitsandbytes:.2f}x that of Linear8bitLt")
    if torch.cpu._is_vnni_supported():
        assert over_bf16 >= OVER_BF16
        assert over_bitsandbytes >= OVER_BITSANDBYTES
