"""A ViT-B block over rows of 197: weights as they come, int8 weights both ways, and bitsandbytes' Linear8bitLt.

    pytest benches/test_int8.py --benchmark-only -s

All arms are the same block, so that only the linears differ. Forward, and forward with dX (no adapters: what the frozen
linears cost). Without VNNI an int8 product is made in fp32 of copies, and nothing was promised there.
"""

import pytest
import torch
from arms import DEVICE, FAST, hold, measure, name_of
from models import TINY
from torch import nn
from transformers import ViTConfig, ViTModel

from u2a_fast import kernels
from u2a_fast.doctor import int8_path
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder

TOKENS = 197
BATCH, ROUNDS = 8, 15
PLAIN = name_of(FAST)


class BitsAndBytesLinear(nn.Module):
    """Linear8bitLt where the block expects a linear of ours."""

    lora_before_dropout = None

    def __init__(self, linear):
        super().__init__()
        import bitsandbytes as bnb

        rows, columns = linear.weight.shape
        self.linear = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False)
        self.linear.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        self.linear.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
        self.linear.to(DEVICE)

    def operands(self):
        return None  # the block runs in parts

    def after_norm(self, norm, tokens, **learned):
        return self(tokens if norm.weight is None else kernels.layer_norm(tokens, *norm[:3])), tokens

    def forward(self, x):
        return self.linear(x)

    def forward_projected(self, x, s):
        return self(x)


def block(mode=None, bitsandbytes=False, **sizes):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(num_hidden_layers=1, **sizes), add_pooling_layer=False).to(DEVICE, FAST)
    built = quantize_encoder(from_pretrained_model(model), mode).blocks[0]
    if bitsandbytes:
        for name in ("qkv", "o", "fc1", "fc2"):
            setattr(built, name, BitsAndBytesLinear(getattr(built, name)))
    return built.eval()


def blocks(**sizes):
    return {
        PLAIN: block(**sizes),
        "int8": block("int8", **sizes),
        "int8_w8a8": block("int8_w8a8", **sizes),
        "Linear8bitLt": block(bitsandbytes=True, **sizes),
    }


def time_int8(benchmark, rounds, batch=BATCH, tokens=TOKENS, backward=False, width=768, **sizes):
    x = torch.randn(batch, tokens, width, device=DEVICE, dtype=FAST, requires_grad=backward)
    modules = blocks(hidden_size=width, **sizes)
    with torch.no_grad():
        expected = modules[PLAIN](x).float()
        assert all((module(x).float() - expected).norm() < 0.05 * expected.norm() for module in modules.values())

    def run(module):
        if backward:
            return module(x).backward(x.detach())
        with torch.no_grad():
            return module(x)

    print(int8_path())
    steps = {name: (lambda module=module: run(module)) for name, module in modules.items()}
    weights = {n: sum(t.numel() * t.itemsize for t in (*m.parameters(), *m.buffers())) for n, m in modules.items()}
    facts = {"bytes": weights, "real_rows": batch * tokens, "backward": backward}
    return measure(benchmark, steps, PLAIN, rounds, **facts)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and dX"])
def test_int8(benchmark, backward):
    rows = time_int8(benchmark, ROUNDS, backward=backward)
    seconds = {name: row["median_s"] for name, row in rows.items()}
    kind = "block with dX" if backward else "block forward"
    gains = {f"int8: W8A8 {kind}, gain over {name}": seconds[name] / seconds["int8_w8a8"] for name in seconds}
    hold(benchmark, {name: gain for name, gain in gains.items() if "A/A" not in name and "int8_w8a8" not in name})


def test_smoke(benchmark):
    time_int8(benchmark, 2, batch=2, tokens=5, width=TINY["hidden_size"], num_attention_heads=4, intermediate_size=64)
