"""A block compiles into one graph and says the same as it does eagerly, gradients included."""

import pytest
import tiny_encoders
import torch
from running import moved

from u2a_fast import LoraConfig
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder
from u2a_fast.layout import dense


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def adapted(family):
    """The first block of an encoder in fp64, and rows that need a gradient."""
    torch.manual_seed(0)
    block = from_pretrained_model(tiny_encoders.build(family)).blocks[0].double()
    for linear in block.linears:
        linear.add_adapter(LoraConfig(r=3, target_modules=("q", "k", "v", "o", "fc1", "fc2")))
        torch.nn.init.normal_(linear.lora_b, std=0.1)
    return block.double(), torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)


def results(block, rows):
    y = block(rows)
    return y, *torch.autograd.grad(y.square().sum(), [rows, *(p for p in block.parameters() if p.requires_grad)])


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_hooks_see_every_linear_and_change_nothing(family):
    block, rows = adapted(family)
    expected, seen = results(block, rows), []
    for name in ("qkv", "o", "fc1", "fc2"):
        linear = getattr(block, name)
        linear.register_forward_pre_hook(lambda linear, given, name=name: seen.append((name, given[0].shape[-1])))
        linear.register_full_backward_hook(
            lambda linear, given, grads, name=name: seen.append((name, grads[0].shape[-1]))
        )
    for got, exact in zip(results(block, rows), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    forward = [(name, getattr(block, name).in_features) for name in ("qkv", "o", "fc1", "fc2")]
    assert seen == forward + [(name, getattr(block, name).out_features) for name in ("fc2", "fc1", "o", "qkv")]


@pytest.mark.parametrize("family", ["vit", "bert"])
@pytest.mark.parametrize("place", ["qkv.lora_b", "fc1.weight", "o.lora_a", "norm1.weight"])
def test_parametrised_tensors_are_what_is_computed_with(family, place):
    block, rows = adapted(family)
    module, name = block.get_submodule(place.split(".")[0]), place.split(".")[1]
    torch.nn.utils.parametrize.register_parametrization(module, name, Doubled())
    got = block(rows)
    torch.nn.utils.parametrize.remove_parametrizations(module, name)
    torch.testing.assert_close(got, block(rows), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, mode",
    [("vit", None), ("bert", None), ("dinov2", None), ("clip_text", None), ("vit", "int8"), ("bert", "int8_w8a8")],
)
def test_compiles_without_a_graph_break(family, mode, device):
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
    compiled = torch.compile(block, fullgraph=True)(tokens, layout, suffix)
    torch.testing.assert_close(compiled, expected)
    for got, exact in zip(
        torch.autograd.grad(compiled.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
