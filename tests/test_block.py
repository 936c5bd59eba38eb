"""A block compiles into one graph and says the same as it does eagerly, gradients included."""

import pytest
import tiny_encoders
import torch
from running import moved

from u2a_fast import LoraConfig
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder
from u2a_fast.layout import dense


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "family, mode",
    [("vit", None), ("bert", None), ("dinov2", None), ("clip_text", None), ("vit", "int8"), ("bert", "int8_w8a8")],
)
def test_compiles_without_a_graph_break(family, mode, backend, device):
    torch.compiler.reset()  # every family is another graph of the same code, and those are limited
    encoder = quantize_encoder(from_pretrained_model(tiny_encoders.build(family)), mode)
    block = encoder.blocks[0].train()
    for linear in block.linears:
        linear.add_adapter(LoraConfig(r=3))
        if linear.lora_b is not None:
            torch.nn.init.normal_(linear.lora_b, std=0.1)
    block.to(device)
    tokens, suffix, lengths = moved((torch.randn(2, 5, 32), torch.randn(2, 32), torch.tensor([5, 3])), device)
    suffix.requires_grad_()
    layout = dense(2, 5, suffix=2, lengths=lengths)
    trained = [suffix, *(p for p in block.parameters() if p.requires_grad)]
    expected = block(tokens, layout, suffix)
    compiled = torch.compile(block, fullgraph=True, backend=backend)(tokens, layout, suffix)
    torch.testing.assert_close(compiled, expected)
    for got, exact in zip(
        torch.autograd.grad(compiled.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
