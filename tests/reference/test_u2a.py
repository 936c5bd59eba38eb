"""ReferenceU2A against the paper's equations, evaluated by hand for a few samples."""

import pytest
import tiny_encoders
import torch

from u2a_fast.reference.u2a import ReferenceU2A

PAIR = {"image": "vit", "text": "bert"}
TRIO = {"image": "vit", "text": "bert", "audio": "wav2vec2"}
MASK = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
LABELS = torch.tensor([0, 2, 1, 1])


def build(names=PAIR, widths=None, **arguments) -> ReferenceU2A:
    torch.manual_seed(0)
    model = ReferenceU2A(tiny_encoders.build_many(names, widths=widths), num_labels=3, **arguments).double()
    for _, b in model.lora_factors().values():
        torch.nn.init.normal_(b, std=0.1)
    return model


def batch(names=PAIR, size=4, padded=True):
    return tiny_encoders.inputs_many(names, size, padded=padded, dtype=torch.float64)


def with_garbage(inputs, mask):
    """NaN in the float inputs of absent rows, a wrong but valid id elsewhere."""
    garbled = {}
    for column, (m, fields) in enumerate(inputs.items()):
        garbled[m] = {key: value.clone() for key, value in fields.items()}
        for value in garbled[m].values():
            value[~mask[:, column]] = float("nan") if value.is_floating_point() else 1
    return garbled


def read(model, m, inputs):
    """c [B, D] and p [B, M - 1, D] of one encoder, all samples."""
    return model.encoders[m].read(inputs[m], model.mask_tokens[m])


def test_selection_and_alignment_by_hand():
    model, inputs = build(), batch()
    (c_image, p_image), (c_text, p_text) = read(model, "image", inputs), read(model, "text", inputs)
    z = torch.stack(
        [
            c_image[0] + c_text[0],
            c_image[1] + p_image[1, 0],
            p_text[2, 0] + c_text[2],
            c_image[3] + c_text[3],
        ]
    )
    both = [0, 3]
    align = (p_image[both, 0] - c_text[both]).square().mean() + (p_text[both, 0] - c_image[both]).square().mean()
    task = torch.nn.functional.cross_entropy(model.head(z), LABELS)
    out = model(with_garbage(inputs, MASK), MASK, LABELS)
    torch.testing.assert_close(out.logits, model.head(z), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.align_loss, align, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.loss, task + 0.2 * align, rtol=0, atol=1e-10)


@pytest.mark.parametrize("translate_all", [False, True])
def test_three_modalities_of_unequal_width_by_hand(translate_all):
    model = build(TRIO, widths={"text": 48, "audio": 24}, translate_all=translate_all)
    inputs, mask = batch(TRIO), torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    assert set(model.translators) == ({"image", "text", "audio"} if translate_all else {"image", "audio"})
    for translator in model.translators.values():
        torch.nn.init.normal_(translator.weight, std=0.2)
    c, p = {}, {}
    for m in TRIO:
        project = model.translators[m] if m in model.translators else torch.nn.Identity()
        c[m], rows = (project(x) for x in read(model, m, inputs))
        for index, j in enumerate(j for j in TRIO if j != m):
            p[m, j] = rows[:, index]
    z = torch.stack(
        [
            c["image"][0] + c["text"][0] + (p["image", "audio"][0] + p["text", "audio"][0]) / 2,
            p["text", "image"][1] + c["text"][1] + p["text", "audio"][1],
            c["image"][2] + c["text"][2] + c["audio"][2],
            c["image"][3] + p["image", "text"][3] + p["image", "audio"][3],
        ]
    )
    align = 0
    for m, j, samples in (("image", "text", [0, 2]), ("image", "audio", [2]), ("text", "audio", [2])):
        align += (p[m, j][samples] - c[j][samples]).square().mean()
        align += (p[j, m][samples] - c[m][samples]).square().mean()
    out = model(inputs, mask, LABELS)
    torch.testing.assert_close(out.logits, model.head(z), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.align_loss, align, rtol=0, atol=1e-10)


def test_separate_heads_by_hand():
    model = build(separate_heads=True, all_absent="prior")
    inputs, mask = batch(), torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    norm = torch.nn.LayerNorm(32, elementwise_affine=False)
    (c_image, p_image), (c_text, p_text) = ((norm(x) for x in read(model, m, inputs)) for m in PAIR)
    prior = norm(torch.cat([model.mask_tokens["image"], model.mask_tokens["text"]])).mean(dim=0)
    image = torch.stack([c_image[0], c_image[1], p_text[2, 0], prior])
    text = torch.stack([c_text[0], p_image[1, 0], c_text[2], prior])
    of_image, of_text = model.head.weight.split(32, dim=1)
    out = model(inputs, mask, LABELS)
    expected = image @ of_image.t() + text @ of_text.t() + model.head.bias
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-10)
    align = (p_image[0, 0] - c_text[0]).square().mean() + (p_text[0, 0] - c_image[0]).square().mean()
    torch.testing.assert_close(out.align_loss, align, rtol=0, atol=1e-10)


def test_gradients_are_finite_and_reach_every_trained_parameter():
    model, inputs = build(), batch()
    model(with_garbage(inputs, MASK), MASK, LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), name
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"mask_tokens.image", "mask_tokens.text", "head.weight", "head.bias"}


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_alignment_target_gets_a_gradient_only_without_stop_gradient(stop_gradient):
    model = build(stop_gradient=stop_gradient)
    proxies = {("image", "text", 0): torch.randn(5, requires_grad=True), ("text", "image", 0): torch.randn(5)}
    classes = {("image", 0): torch.randn(5), ("text", 0): torch.randn(5, requires_grad=True)}
    model.alignment(classes, proxies).backward()
    assert proxies["image", "text", 0].grad is not None
    assert (classes["text", 0].grad is None) == stop_gradient


def test_dropped_modalities_are_absent_ones():
    model, inputs = build(), batch()
    drop = torch.tensor([[False, True], [False, False], [False, False], [True, False]])
    everything = torch.ones(4, 2, dtype=torch.bool)
    expected = model(inputs, everything & ~drop, LABELS)
    out = model(inputs, None, LABELS, drop=drop)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.align_loss, expected.align_loss)


def test_a_modality_without_inputs_is_absent():
    model, inputs = build(), batch()
    expected = model(inputs, torch.tensor([[False, True]]).expand(4, -1)).logits
    assert torch.equal(model({"text": inputs["text"]}).logits, expected)


def test_no_pair_has_both():
    mask = torch.tensor([[True, False], [False, True], [True, False], [False, True]])
    out = build()(batch(), mask, LABELS)
    assert out.align_loss == 0 and out.loss == out.task_loss


def test_a_sample_with_nothing():
    mask = MASK.clone()
    mask[1] = False
    with pytest.raises(ValueError, match="no modality"):
        build()(batch(), mask)
    model = build(all_absent="prior", widths={"text": 48})
    tokens = torch.stack([model.translators["image"](model.mask_tokens["image"][0]), model.mask_tokens["text"][0]])
    logits = model(batch(), mask).logits
    torch.testing.assert_close(logits[1], model.head(tokens.mean(dim=0)), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits[[0, 2]], model(batch(), MASK).logits[[0, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [{"a": "clip_text", "b": "clip_vision"}, {"a": "siglip_vision", "b": "whisper"}])
def test_other_families(names):
    out = build(names)(batch(names), MASK, LABELS)
    assert out.logits.isfinite().all() and out.loss.isfinite()
