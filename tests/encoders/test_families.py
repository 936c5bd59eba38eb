"""Every family's hidden states are Hugging Face's, wherever padding stands and whatever the size of a picture."""

import pickle
from dataclasses import replace
from functools import partial

import pytest
import tiny_encoders
import torch
from running import CPU, moved, on
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    WhisperConfig,
    WhisperModel,
)

from u2a_fast.encoders import Encoder, from_pretrained_model, load
from u2a_fast.encoders.base import masked_mean
from u2a_fast.encoders.families import DINOV2, DINOV3, VIT
from u2a_fast.padding import padding_of
from u2a_fast.reference import ReferenceEncoder


def pair(name, dtype, device=CPU, **overrides):
    """Hugging Face's model, on the CPU, and our encoder of it."""
    model = tiny_encoders.build(name, **overrides).to(dtype)
    return model, from_pretrained_model(model).to(device)


def hidden_states(model, name, device, inputs):
    """Hugging Face's, on our device: tables of angles and positions are fp32, whose last bit is each device's own."""
    return on(device, partial(tiny_encoders.hidden_states, model.to(device), name))(**inputs)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_hidden_states_equal_hugging_face(name, padded, dtype, limit, device):
    model, encoder = pair(name, dtype, device)
    inputs = tiny_encoders.inputs(name, batch=3, padded=padded, dtype=dtype)
    with torch.no_grad():
        expected = hidden_states(model, name, device, inputs)
        real = tiny_encoders.token_mask(model, name, **inputs)
        difference = (on(device, encoder)(**inputs) - expected).abs()
    if real is not None:
        difference = difference[real]
    assert difference.numel() and difference.max() < limit


def class_rows(hidden, mask, which):
    """[B, D]: the first or last real row, or the mean of the real ones."""
    rows = [states[real] for states, real in zip(hidden, mask, strict=True)]
    return torch.stack([{"first": own[0], "last": own[-1], "mean": own.mean(dim=0)}[which] for own in rows])


@pytest.mark.parametrize("name", tiny_encoders.TEXT_FAMILIES)
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_padding_anywhere_equals_hugging_face(name, kind, device):
    model, encoder = pair(name, torch.float64, device)
    inputs = tiny_encoders.inputs(name, batch=3)
    mask = torch.ones_like(inputs["input_ids"])
    if kind == "left":
        mask[1, :3] = mask[2, :1] = 0
    else:
        mask[1, 2] = mask[2, 4] = mask[2, 6] = 0
    if name == "clip_text":  # which pads with the id that ends a text
        inputs["input_ids"][mask == 0] = tiny_encoders.END_OF_TEXT
    inputs["attention_mask"] = mask
    with torch.no_grad():
        expected = hidden_states(model, name, device, inputs)
        tokens, padding_mask = encoder.embed(**moved(inputs, device))
        hidden = encoder.finish(encoder.run(tokens, padding_mask))
        hidden_static = encoder.finish(encoder.run(tokens, padding_of(padding_mask, static=True)))
        class_token = encoder.class_token(hidden, padding_mask)
        reference = ReferenceEncoder(model)(**moved(inputs, device))
    real = mask.bool()
    assert torch.equal(moved(padding_mask, CPU), real)
    for states in (hidden, hidden_static, reference):
        assert (moved(states, CPU) - expected).abs()[real].max() < 1e-9
    expected = class_rows(expected, real, encoder.family.class_token)
    torch.testing.assert_close(moved(class_token, CPU), expected)


@pytest.mark.parametrize(
    "name, side, options",
    [
        ("dinov2", 40, {}),
        ("dinov2_registers", 32, {}),
        ("dinov3", 40, {}),
        ("dinov2", 40, {"interpolate_pos_encoding": True}),
        ("beit", 40, {"interpolate_pos_encoding": True}),
        ("data2vec_vision", 24, {"interpolate_pos_encoding": True}),
        ("vit", 40, {"interpolate_pos_encoding": True}),
        ("siglip_vision", 32, {"interpolate_pos_encoding": True}),
        ("vit_mae", 40, {"interpolate_pos_encoding": True}),
    ],
)
def test_pictures_of_another_size_equal_hugging_face(name, side, options):
    model, encoder = pair(name, torch.float64)
    picture = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = tiny_encoders.hidden_states(model, name, pixel_values=picture, **options)
    assert (encoder(pixel_values=picture, **options) - expected).abs().max() < 1e-9


def test_an_old_clip_config_means_the_highest_id_by_its_end_of_text():
    model = tiny_encoders.build("clip_text", eos_token_id=2).double()
    inputs = tiny_encoders.inputs("clip_text", batch=3, padded=True)
    _, padding_mask = from_pretrained_model(model).embed(**inputs)
    assert torch.equal(padding_mask, inputs["attention_mask"].bool())
    assert torch.equal(ReferenceEncoder(model).embed(**inputs)[1], padding_mask)


ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_python",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "tanh",
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_hugging_faces(activation, device):
    model, encoder = pair("bert", torch.float64, device, hidden_act=activation)
    inputs = tiny_encoders.inputs("bert", batch=2)
    expected = hidden_states(model, "bert", device, inputs)
    assert (on(device, encoder)(**inputs) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", tiny_encoders.SPEECH_FAMILIES)
def test_a_clip_shorter_than_one_row_makes_one(name, device):
    _, encoder = pair(name, torch.float32, device)
    clip, mask = moved((torch.randn(2, 3), torch.ones(2, 3).long()), device)
    tokens, padding_mask = encoder.embed(input_values=clip, attention_mask=mask)
    assert tokens.shape[1] == 1 and padding_mask.all() and encoder.class_token(tokens, padding_mask).any()


def test_whisper_stays_finite_in_fp16_where_hugging_face_does(device):
    model = tiny_encoders.build("whisper").half()
    with torch.no_grad():
        for layer in model.layers:
            layer.fc2.bias[0] = 60000  # of all columns, and their norm would make much of the last bit
    inputs = tiny_encoders.inputs("whisper", batch=2, dtype=torch.float16)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        hidden = on(device, from_pretrained_model(model).to(device))(**inputs)
    assert expected.isfinite().all()
    torch.testing.assert_close(hidden, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [name for name in tiny_encoders.FAMILIES if name not in tiny_encoders.SPEECH_FAMILIES])
def test_pickled_and_back_it_is_the_same_encoder(name):
    """But those of speech: torch pickles no convolution with a weight norm, in Hugging Face's models either."""
    _, encoder = pair(name, torch.float32)
    inputs = tiny_encoders.inputs(name, batch=2)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(**inputs), encoder(**inputs))


@pytest.mark.parametrize(
    "name, family", [("vit", VIT), ("dinov2", DINOV2), ("dinov2_gated", DINOV2), ("dinov3_gated", DINOV3)]
)
def test_a_family_that_is_passed_is_read_as_one_that_is_found(name, family):
    model, encoder = pair(name, torch.float32)
    inputs = tiny_encoders.inputs(name, batch=2)
    passed = from_pretrained_model(model, family=replace(family, name="mine"))
    assert torch.equal(passed(**inputs), encoder(**inputs))


def test_types_of_tokens_reach_a_family_that_takes_any_inputs():
    model, inputs = tiny_encoders.build("bert"), tiny_encoders.inputs("bert", batch=2)
    inputs["token_type_ids"] = torch.tensor([0, 1]).repeat(7)[:7].expand(2, 7)
    found = from_pretrained_model(model)
    family = replace(found.family, embed=lambda encoder, **given: found.family.embed(encoder, **given))
    passed = from_pretrained_model(model, family)
    expected = found(**inputs)
    assert torch.equal(passed(**inputs), expected)
    del inputs["token_type_ids"]
    assert not torch.equal(passed(**inputs), expected)


@pytest.mark.parametrize("name, kinds", [("modernbert", ["full", "sliding"]), ("gemma3", ["sliding", "full"])])
def test_rotary_positions_stand_in_the_order_of_the_layers(name, kinds):
    """And not in that of a set of strings, which each process has its own of."""
    _, encoder = pair(name, torch.float32)
    assert list(encoder.rotary) == [f"{kind}_attention" for kind in kinds]


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_zero_rows_run(name, device):
    _, encoder = pair(name, torch.float32, device)
    inputs = {k: v[:0] for k, v in tiny_encoders.inputs(name, batch=2).items()}
    hidden = encoder(**moved(inputs, device))
    assert hidden.shape[0] == 0 and encoder.class_token(hidden).shape == (0, encoder.width)


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_frozen_and_without_dropout_in_train_mode(name, device):
    model = tiny_encoders.build(name)
    trained = [p.requires_grad for p in model.parameters()]
    encoder, inputs = from_pretrained_model(model).to(device), moved(tiny_encoders.inputs(name, batch=2), device)
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


def settings(name):
    return tiny_encoders.CONFIGS[name][2]


def clip():
    return CLIPModel(CLIPConfig(text_config=settings("clip_text"), vision_config=settings("clip_vision")))


def siglip():
    return SiglipModel(SiglipConfig(text_config=settings("siglip_text"), vision_config=settings("siglip_vision")))


def siglip2():
    return Siglip2Model(Siglip2Config(text_config=settings("siglip2_text"), vision_config=settings("siglip2_vision")))


def whisper():
    decoder = dict(decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=8, vocab_size=9)
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    return WhisperModel(WhisperConfig(**settings("whisper"), **decoder, **ids))


@pytest.mark.parametrize(
    "build, tower, modality, name",
    [
        (clip, "text_model", "text", "clip_text"),
        (clip, "vision_model", "image", "clip_vision"),
        (siglip, "text_model", "text", "siglip_text"),
        (siglip, "vision_model", "image", "siglip_vision"),
        (siglip2, "text_model", "text", "siglip2_text"),
        (siglip2, "vision_model", "image", "siglip2_vision"),
        (whisper, "encoder", "audio", "whisper"),
    ],
)
def test_the_tower_of_a_modality_is_loaded_from_a_folder_with_two(tmp_path, build, tower, modality, name):
    whole = build().eval()
    whole.save_pretrained(tmp_path)
    inputs = tiny_encoders.inputs(name, batch=2)
    with torch.no_grad():
        expected = whole.get_submodule(tower)(**inputs).last_hidden_state
        hidden = from_pretrained_model(load(str(tmp_path), modality))(**inputs)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_a_text_encoder_is_loaded_without_its_pooler(tmp_path):
    tiny_encoders.build("bert").save_pretrained(tmp_path)
    assert load(str(tmp_path), "text").pooler is None


def test_attributes():
    _, encoder = pair("whisper", torch.float32)
    assert isinstance(encoder, Encoder)
    assert (encoder.width, encoder.num_layers, len(encoder.blocks)) == (32, 2, 2)


@pytest.mark.parametrize("name", ["bert", "clip_text", "llama", "siglip_vision", "siglip2_vision", "wav2vec2"])
def test_class_token_reads_the_right_row(name, device):
    model, encoder = pair(name, torch.float64, device)
    inputs = tiny_encoders.inputs(name, batch=4, padded=True, dtype=torch.float64)
    tokens, padding_mask = encoder.embed(**moved(inputs, device))
    hidden = encoder.finish(encoder.run(tokens, padding_mask))
    class_token = moved(encoder.class_token(hidden, padding_mask), CPU)
    states = hidden_states(model, name, device, inputs)
    real = tiny_encoders.token_mask(model, name, **inputs)
    real = torch.ones(states.shape[:2], dtype=torch.bool) if real is None else real
    expected = class_rows(states, real, {"bert": "first", "clip_text": "last", "llama": "last"}.get(name, "mean"))
    if name == "clip_text":
        torch.testing.assert_close(moved(model(**moved(inputs, device)).pooler_output, CPU), expected)
    torch.testing.assert_close(class_token, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_of_rows_whose_sum_leaves_fp16_is_exact(masked, device):
    tokens, mask = torch.full((2, 512, 3), 200.0, dtype=torch.float16), torch.ones(2, 512, dtype=torch.bool)
    mask[0, 400:] = False
    tokens[0, 400:] = torch.nan if masked else 200.0
    mean = moved(masked_mean(*moved((tokens, mask if masked else None), device)), CPU)
    assert mean.dtype == torch.float16 and torch.equal(mean, torch.full((2, 3), 200.0, dtype=torch.float16))
