"""Under torch.compile, where no value of a mask is read, a method answers as it does without."""

import functools

import parity
import pytest
import tiny_encoders
import torch

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig

METHODS = {
    "u2a": functools.partial(U2A, modality_dropout=0.0),
    "pmf": functools.partial(PMF, fusion_layers=1),
    "joint embedding": functools.partial(JointEmbedding, tuning=LoraConfig()),
    "late fusion": LateFusion,
}
FAMILIES = ["bert", "eurobert", "modernbert", "clip_text", "siglip_text", "mistral", "gemma3", "embedding_gemma"]
PADDING = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    "holes": [[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1, 0]],
}


def case(families, method, padding, **sizes):
    """A model and three samples whose texts are padded so."""
    torch.manual_seed(0)
    model = METHODS[method](tiny_encoders.build_many(families, **sizes), num_labels=5).double()
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = parity.batch(families, 3, padded=False)
    inputs["text"]["attention_mask"] = torch.tensor(PADDING[padding])
    return model, inputs


def results(model, inputs, run):
    """Logits and every gradient of one step."""
    model.zero_grad()
    out = run(**inputs, labels=torch.arange(3))
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys() and len(got) > 1
    for name, value in expected.items():
        parity.assert_close(got[name], value, 1e-9, name)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_anywhere_is_hidden_where_masks_are_not_read(family, method, padding, monkeypatch):
    model, inputs = case({"text": family, "image": "vit"}, method, padding)
    expected = results(model, inputs, model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(results(model, inputs, model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pmf", "joint embedding"])
def test_compiled_and_eager_agree_wherever_texts_are_padded(method):
    torch._dynamo.reset()
    families = {"text": "siglip_text", "image": "vit"}
    model, right = case(families, method, "right", num_hidden_layers=1)
    _, left = case(families, method, "left", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    for inputs in (right, left):
        assert_same(results(model, inputs, compiled), results(model, inputs, model))
