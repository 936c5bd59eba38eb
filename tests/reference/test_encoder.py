"""The reference encoder is Hugging Face's encoder, and learned rows are seen by whom they should be."""

import copy

import pytest
import tiny_encoders
import torch

from u2a_fast.reference.encoder import ReferenceEncoder

CASES = [(name, False) for name in tiny_encoders.FAMILIES] + [(name, True) for name in tiny_encoders.PADDED_FAMILIES]


def double(name: str):
    return tiny_encoders.build(name).double()


def real_rows(states, mask):
    return states if mask is None else states[mask]


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_equals_hugging_face(name, padded):
    model, inputs = double(name), tiny_encoders.inputs(name, 3, padded=padded, dtype=torch.float64)
    mask = tiny_encoders.token_mask(model, name, **inputs)
    encoder = ReferenceEncoder(model).train()
    expected = tiny_encoders.hidden_states(model, name, **inputs)
    torch.testing.assert_close(real_rows(encoder(**inputs), mask), real_rows(expected, mask), rtol=0, atol=1e-10)
    padding_mask = encoder.embed(**inputs)[1]
    if padding_mask is not None and mask is not None:
        assert torch.equal(padding_mask, mask)


@pytest.mark.parametrize("name", tiny_encoders.FAMILIES)
def test_leaves_the_callers_model_alone(name):
    model = tiny_encoders.build(name).train()
    before = copy.deepcopy(model.state_dict())
    encoder = ReferenceEncoder(model)
    encoder.add_lora(2, 4, ("q", "k", "v", "o", "fc1", "fc2"))
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any("lora" in key for key in model.state_dict())
    assert {key.rpartition(".")[2] for key, p in encoder.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


def test_class_token_is_hugging_faces_pooled_row():
    model, inputs = double("clip_text"), tiny_encoders.inputs("clip_text", 4, padded=True)
    expected = model(**inputs).pooler_output
    encoder = ReferenceEncoder(model)
    unmasked = {"input_ids": inputs["input_ids"]}  # CLIP text is causal: its end-of-text row needs no mask
    for given in (inputs, unmasked):
        mask = encoder.embed(**given)[1]
        torch.testing.assert_close(encoder.class_token(encoder(**given), mask), expected, rtol=0, atol=1e-10)


def test_class_token_of_an_encoder_without_one_is_the_mean_of_real_rows():
    model, inputs = double("hubert"), tiny_encoders.inputs("hubert", 3, padded=True, dtype=torch.float64)
    mask = tiny_encoders.token_mask(model, "hubert", **inputs)
    states = tiny_encoders.hidden_states(model, "hubert", **inputs)
    expected = torch.stack([row[:length].mean(dim=0) for row, length in zip(states, mask.sum(dim=1), strict=True)])
    encoder = ReferenceEncoder(model)
    torch.testing.assert_close(encoder.class_token(encoder(**inputs), mask), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "padded"), CASES)
def test_read_only_rows_change_nothing_and_see_only_tokens(name, padded):
    model, inputs = double(name), tiny_encoders.inputs(name, 2, padded=padded, dtype=torch.float64)
    encoder = ReferenceEncoder(model)
    learned = torch.randn(3, encoder.width, dtype=torch.float64)
    classes, rows = encoder.read(inputs, learned, read_only=True)
    padding_mask = encoder.embed(**inputs)[1]
    torch.testing.assert_close(classes, encoder.class_token(encoder(**inputs), padding_mask), rtol=0, atol=1e-12)
    for index in range(3):
        others = torch.randn_like(learned).index_copy(0, torch.tensor([index]), learned[index : index + 1])
        among_others = encoder.read(inputs, others, read_only=True)[1]
        torch.testing.assert_close(rows[:, index], among_others[:, index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", tiny_encoders.TEXT_FAMILIES)
def test_visible_rows_equal_padded_rows_shortened(name):
    """Learned rows beside padding are what they are beside the unpadded text alone."""
    model, inputs = double(name), tiny_encoders.inputs(name, 3, padded=True)
    encoder = ReferenceEncoder(model)
    learned = torch.randn(2, encoder.width, dtype=torch.float64)
    classes, rows = encoder.read(inputs, learned)
    for i, length in enumerate(inputs["attention_mask"].sum(dim=1)):
        alone = encoder.read({key: value[i : i + 1, :length] for key, value in inputs.items()}, learned)
        torch.testing.assert_close((classes[i : i + 1], rows[i : i + 1]), alone, rtol=0, atol=1e-10)


def test_learned_rows_are_seen_except_by_causal_tokens():
    for name, changes in (("bert", True), ("vit", True), ("clip_text", False)):
        inputs = tiny_encoders.inputs(name, 2, dtype=torch.float64)
        encoder = ReferenceEncoder(double(name))
        learned = torch.randn(2, encoder.width, dtype=torch.float64)
        alone = encoder.class_token(encoder(**inputs))
        with_rows, _ = encoder.read(inputs, learned)
        assert (with_rows - alone).abs().max().gt(1e-3).item() is changes


def test_lora_is_the_weight_plus_its_product():
    encoder = ReferenceEncoder(double("vit"))
    inputs = tiny_encoders.inputs("vit", 2, dtype=torch.float64)
    merged = copy.deepcopy(encoder)
    encoder.add_lora(3, 6, ("q", "fc2"))
    assert set(encoder.lora_factors()) == {(i, role) for i in range(2) for role in ("q", "fc2")}
    for (layer, role), (a, b) in encoder.lora_factors().items():
        torch.nn.init.normal_(b)
        merged.part(layer, role).weight.data += 2.0 * b.detach() @ a.detach()
    torch.testing.assert_close(encoder(**inputs), merged(**inputs), rtol=0, atol=1e-10)
