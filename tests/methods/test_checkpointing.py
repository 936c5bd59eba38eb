"""Reentrant checkpoints train the same as none, or are refused before anything is trained."""

import parity
import pytest
import tiny_encoders
import torch

from u2a_fast import U2A
from u2a_fast.methods import METHODS

PAIR = {"image": "vit", "text": "bert"}


def gradients(method, reentrant):
    torch.manual_seed(0)
    model = method(tiny_encoders.build_many(PAIR), num_labels=3).train()
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    if reentrant:
        model.activation_checkpointing_enable({"use_reentrant": True})
    batch = parity.batch(PAIR, 6, dtype=torch.float32)
    torch.manual_seed(0)  # of modality dropout
    model(**batch, modality_mask=parity.random_presence(6, 2, 0), labels=torch.arange(6) % 3).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_u2a_takes_reentrant_checkpoints():
    plain, reentrant = gradients(U2A, False), gradients(U2A, True)
    assert any("lora_a" in name for name in plain)
    for name, expected in plain.items():
        parity.assert_close(reentrant[name], expected, 1e-5, name)


def test_u2a_refuses_them_where_its_mask_tokens_do_not_train():
    model = U2A(tiny_encoders.build_many(PAIR), num_labels=3)
    model.mask_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match="U2A needs use_reentrant=False"):
        model.activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method is not U2A])
def test_all_others_refuse_them_since_not_everything_would_train(method):
    with pytest.raises(ValueError, match=f"{method.__name__} needs use_reentrant=False: .* not train all"):
        gradients(method, True)
    assert gradients(method, False)
