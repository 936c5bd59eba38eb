"""`read` says of the class token and the learned rows what all rows say, and computes no other in the last block."""

import pytest
import tiny_encoders
import torch
from running import moved

from u2a_fast import LoraConfig
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder
from u2a_fast.padding import padding_of


def encoder_of(family):
    encoder = from_pretrained_model(tiny_encoders.build(family).double())
    for block in encoder.blocks:
        for linear in block.linears:
            linear.add_adapter(LoraConfig(r=3, target_modules=("q", "v", "o", "fc2")))
            if linear.lora_b is not None:
                torch.nn.init.normal_(linear.lora_b, std=0.1)
    return encoder.double()


@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_values_and_gradients_are_those_of_all_rows(family, suffix, device, mode=None):
    encoder = quantize_encoder(encoder_of(family), mode).to(device)
    tokens, mask = encoder.embed(**moved(tiny_encoders.inputs(family, 3, padded=True), device))
    learned = moved(torch.randn(suffix, tokens.shape[2], dtype=torch.float64), device).requires_grad_()
    learned = learned if suffix else None
    trained = [p for p in (*encoder.parameters(), learned) if p is not None and p.requires_grad]
    hidden = encoder.finish(encoder.run(tokens, mask, learned))
    length = tokens.shape[1]
    expected = torch.cat([encoder.class_token(hidden[:, :length], mask)[:, None], hidden[:, length:]], dim=1)
    class_token, rows = encoder.read(tokens, padding_of(mask), learned)
    got = torch.cat([class_token[:, None], rows], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(got)
    grads = [torch.autograd.grad((t * weight).sum(), trained) for t in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["vit", "bert", "qwen3", "dinov3"])
def test_values_and_gradients_are_those_of_all_rows_where_weights_are_quantised(family, mode, device):
    test_values_and_gradients_are_those_of_all_rows(family, 2, device, mode)


@pytest.mark.parametrize("mode", [None, "int8", "nf4"])
@pytest.mark.parametrize("family", ["vit", "bert", "qwen3", "dinov3"])
def test_rows_that_nobody_reads_are_not_computed(family, mode):
    encoder, seen = encoder_of(family), []
    quantize_encoder(encoder, mode)
    encoder.blocks[-1].fc2.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[:-1].numel()))
    tokens, mask = encoder.embed(**tiny_encoders.inputs(family, 3, padded=True))
    encoder.read(tokens, padding_of(mask), torch.randn(2, tokens.shape[2], dtype=torch.float64))
    assert seen == [3 * (1 + 2)]


def test_the_last_block_is_called_and_not_reached_into():
    """What wraps a module wraps its call: FSDP gathers weights there, checkpointing recomputes it."""
    encoder, seen = encoder_of("vit"), []
    encoder.blocks[-1].register_forward_pre_hook(lambda *_: seen.append(1))
    tokens, _ = encoder.embed(**tiny_encoders.inputs("vit", 3))
    encoder.read(tokens)
    assert seen == [1]


def test_padding_is_not_computed():
    encoder, seen = encoder_of("bert"), []
    qkv = encoder.blocks[1].qkv
    tokens, mask = encoder.embed(**tiny_encoders.inputs("bert", 3, padded=True))
    encoder.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    encoder.run(tokens, mask)
    assert not mask.all() and seen == [(1, int(mask.sum()), qkv.in_features)]


def test_tokens_that_need_no_gradient_get_none_in_the_first_block():
    """The product of dX = dY W over all rows is the largest of a backward; only learned rows have one there."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = encoder_of("vit")
    tokens, _ = encoder.embed(**tiny_encoders.inputs("vit", 3))
    block, rows = encoder.blocks[0], tokens.shape[0] * tokens.shape[1]
    learned = torch.randn(2, tokens.shape[2], dtype=torch.float64, requires_grad=True)

    def flops(tokens):
        layout = encoder.layout_of(tokens, None, len(learned))
        out = block(tokens, layout, learned).sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        return counter.get_total_flops()

    saved = flops(tokens.detach().requires_grad_()) - flops(tokens.detach())
    assert saved >= 2 * rows * 3 * tokens.shape[2] ** 2
