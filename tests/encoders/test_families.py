"""Every family's hidden states are Hugging Face's, and what cannot be right is refused."""

import pytest
import tiny_encoders
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
)

from u2a_fast.encoders import Encoder, from_pretrained_model


def pair(name, dtype, **overrides):
    model = tiny_encoders.build(name, **overrides).to(dtype)
    return model, from_pretrained_model(model)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_hidden_states_equal_hugging_face(name, padded, dtype, limit):
    model, encoder = pair(name, dtype)
    inputs = tiny_encoders.inputs(name, batch=3, padded=padded, dtype=dtype)
    with torch.no_grad():
        expected = tiny_encoders.hidden_states(model, name, **inputs)
        real = tiny_encoders.token_mask(model, name, **inputs)
        difference = (encoder(**inputs) - expected).abs()
    if real is not None:
        difference = difference[real]
    assert difference.numel() and difference.max() < limit


@pytest.mark.parametrize("name", ["bert", "roberta", "clip_text"])
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_padding_anywhere_equals_hugging_face(name, kind):
    model, encoder = pair(name, torch.float64)
    inputs = tiny_encoders.inputs(name, batch=3)
    mask = torch.ones_like(inputs["input_ids"])
    if kind == "left":
        mask[1, :3] = mask[2, :1] = 0
    else:
        mask[1, 2] = mask[2, 4] = 0
    inputs["attention_mask"] = mask
    with torch.no_grad():
        expected = tiny_encoders.hidden_states(model, name, **inputs)
        difference = (encoder(**inputs) - expected).abs()[mask.bool()]
    assert difference.max() < 1e-9


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_zero_rows_run(name):
    _, encoder = pair(name, torch.float32)
    inputs = {k: v[:0] for k, v in tiny_encoders.inputs(name, batch=2).items()}
    hidden = encoder(**inputs)
    assert hidden.shape[0] == 0 and encoder.class_token(hidden).shape == (0, encoder.width)


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_frozen_and_without_dropout_in_train_mode(name):
    model = tiny_encoders.build(name)
    trained = [p.requires_grad for p in model.parameters()]
    encoder, inputs = from_pretrained_model(model), tiny_encoders.inputs(name, batch=2)
    expected = encoder.eval()(**inputs)
    assert torch.equal(encoder.train()(**inputs), expected)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert trained == [p.requires_grad for p in model.parameters()]


def test_casting_the_encoder_leaves_the_model_given_alone():
    model, encoder = pair("vit", torch.float32)
    encoder.double()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_poolers_are_dropped():
    _, encoder = pair("bert", torch.float32)
    assert not any("pooler" in name for name, _ in encoder.named_parameters())


def test_attributes():
    _, encoder = pair("whisper", torch.float32)
    assert isinstance(encoder, Encoder)
    assert (encoder.width, encoder.num_layers, len(encoder.blocks)) == (32, 2, 2)


@pytest.mark.parametrize("name", ["bert", "clip_text", "siglip_vision", "wav2vec2"])
def test_class_token_reads_the_right_row(name):
    model, encoder = pair(name, torch.float64)
    inputs = tiny_encoders.inputs(name, batch=4, padded=True, dtype=torch.float64)
    tokens, padding_mask = encoder.embed(**inputs)
    hidden = encoder.finish(encoder.run(tokens, padding_mask))
    class_token = encoder.class_token(hidden, padding_mask)
    outputs = model(**inputs)
    if name == "bert":
        expected = outputs.last_hidden_state[:, 0]
    elif name == "clip_text":
        expected = outputs.pooler_output
    else:
        real = tiny_encoders.token_mask(model, name, **inputs)
        states = outputs.last_hidden_state
        keep = [slice(None)] * len(states) if real is None else real
        expected = torch.stack([state[rows].mean(0) for state, rows in zip(states, keep, strict=True)])
    torch.testing.assert_close(class_token, expected)


SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def pruned():
    model = tiny_encoders.build("bert")
    for role in ("query", "key", "value"):
        setattr(model.encoder.layer[1].attention.self, role, torch.nn.Linear(32, 24))
    model.encoder.layer[1].attention.output.dense = torch.nn.Linear(24, 32)
    return model


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: BertForSequenceClassification(BertConfig(vocab_size=9, **SMALL)), "task head"),
        (
            lambda: DistilBertModel(DistilBertConfig(vocab_size=9, dim=16, n_layers=1, n_heads=2)),
            "BERT.*Whisper encoder",
        ),
        (lambda: CLIPModel(CLIPConfig(text_config=SMALL | {"vocab_size": 9}, vision_config=SMALL)), "two towers"),
        (lambda: Dinov2Model(Dinov2Config(use_swiglu_ffn=True, **SMALL)), "gated MLP"),
        (pruned, "pruned"),
    ],
)
def test_unsupported_models_are_refused_in_one_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained_model(build())
