"""ReferencePMF: parameter counts, names, depths, and what a missing modality says."""

import pytest
import tiny_encoders
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast.reference.pmf import ReferencePMF

PAIR = {"image": "vit", "text": "bert"}
MASK = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
LABELS = torch.tensor([0, 2, 1, 1])


def build(names=PAIR, encoders=None, **arguments) -> ReferencePMF:
    torch.manual_seed(0)
    model = ReferencePMF(encoders or tiny_encoders.build_many(names), num_labels=3, **arguments).double()
    for name, parameter in model.named_parameters():
        if "prompt" in name:
            torch.nn.init.normal_(parameter)
    return model


def batch(names=PAIR, size=4):
    return tiny_encoders.inputs_many(names, size, padded=True, dtype=torch.float64)


def trained(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def formula(d: int, h: int, layers: int, prompts: int, labels: int) -> int:
    """methods.md section 3, equal widths."""
    return layers * (2 * d * prompts + 2 * (d * h + h + h * d + d)) + 2 * (d + 1) * labels


def test_trained_parameters_of_tiny_encoders():
    assert trained(build()) == formula(d=32, h=16, layers=2, prompts=12, labels=3)
    assert trained(build(fusion_layers=1, query_prompts=2, query_context_prompts=0)) == formula(32, 16, 1, 6, 3)
    assert trained(build(train_fusion_context=False)) == formula(32, 16, 2, prompts=8, labels=3)


@pytest.mark.slow
def test_trained_parameters_of_base_encoders():
    with torch.device("meta"):
        encoders = {
            "image": ViTModel(ViTConfig(), add_pooling_layer=False),
            "text": BertModel(BertConfig(), add_pooling_layer=False),
        }
        model = ReferencePMF(encoders, num_labels=101)
    total = sum(p.numel() for p in model.parameters())
    assert trained(model) == formula(768, 384, 2, 12, 101) == 2_556_106
    assert round(100 * trained(model) / total, 3) == 1.296


def test_exported_names():
    names = set(build().export_parameters())
    per_layer = {"query_prompt", "query_context_prompt", "fusion_context_prompt"}
    per_layer |= {f"translator.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    expected = {f"layers.{i}.{m}.{name}" for i in (0, 1) for m in PAIR for name in per_layer}
    assert names == expected | {f"head.{m}.{kind}" for m in PAIR for kind in ("weight", "bias")}


def test_one_fusion_layer_by_hand():
    """The top layer of a two-layer BERT fused with the top layer of a three-layer ViT, written out."""
    encoders = {"image": tiny_encoders.build("vit", num_hidden_layers=3), "text": tiny_encoders.build("bert")}
    model, inputs = build(encoders=encoders, fusion_layers=1), batch()
    image, text = model.encoders["image"], model.encoders["text"]
    fusion, padding = model.layers[0], inputs["text"]["attention_mask"].bool()
    visible = torch.cat([padding, torch.ones(4, 8, dtype=torch.bool)], dim=1)[:, None, None, :]

    def expand(*prompts):
        return torch.cat([p.expand(4, -1, -1) for p in prompts], dim=1)

    x_v = image.model.layers[1](image.model.layers[0](image.embed(**inputs["image"])[0]))
    x_t = text.model.encoder.layer[0](text.embed(**inputs["text"])[0], visible[..., :7])
    v, t = fusion["image"], fusion["text"]
    rows_v = torch.cat([x_v, expand(v.query_context_prompt, v.query_prompt)], dim=1)
    rows_t = torch.cat([x_t, expand(t.query_context_prompt, t.query_prompt)], dim=1)
    to_text = v.translator(image.model.layers[2](rows_v)[:, -4:])
    to_image = t.translator(text.model.encoder.layer[1](rows_t, visible)[:, -4:])
    fused_v = image.model.layers[2](torch.cat([x_v, expand(v.fusion_context_prompt), to_image], dim=1))[:, :10]
    rows_t = torch.cat([x_t, expand(t.fusion_context_prompt), to_text], dim=1)
    fused_t = text.model.encoder.layer[1](rows_t, visible)[:, :7]
    logits_v = model.head["image"](image.model.layernorm(fused_v)[:, 0])
    logits_t = model.head["text"](fused_t[:, 0])
    torch.testing.assert_close(model(inputs).logits, (logits_v + logits_t) / 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fusion_layers", [1, 2])
@pytest.mark.parametrize("context", [0, 3])
def test_depth_and_prompt_counts(fusion_layers, context):
    counts = {"query_prompts": 1, "query_context_prompts": context, "fusion_context_prompts": context}
    model, inputs = build(fusion_layers=fusion_layers, **counts), batch()
    model(inputs, MASK, LABELS).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() and (g.numel() == 0 or g.any()) for g in gradients.values())


def test_fusion_layers_beyond_the_depth():
    with pytest.raises(ValueError, match="fusion_layers"):
        build(fusion_layers=3)


def test_missing_modality_by_hand():
    """Only text is missing: the image is fused with the translation of text's own query prompts; its logits stand."""
    model, inputs = build(fusion_layers=1), batch()
    image, fusion = model.encoders["image"], model.layers[0]
    x = image.model.layers[0](image.embed(**inputs["image"])[0])
    message = fusion["text"].translator(fusion["text"].query_prompt)
    learned = torch.cat([fusion["image"].fusion_context_prompt, message]).expand(4, -1, -1)
    fused = image.model.layers[1](torch.cat([x, learned], dim=1))[:, :10]
    expected = model.head["image"](image.model.layernorm(fused)[:, 0])
    out = model(inputs, MASK)
    torch.testing.assert_close(out.logits[1], expected[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(out.logits[[0, 3]], model(inputs).logits[[0, 3]], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_three_modalities_of_unequal_width():
    names = {"image": "vit", "text": "bert", "audio": "wav2vec2"}
    model = build(encoders=tiny_encoders.build_many(names, widths={"text": 48, "audio": 24}))
    assert model.layers[0]["text"].translator["audio"][0].weight.shape == (24, 48)
    assert model.layers[0]["audio"].translator["image"][0].weight.shape == (16, 24)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    inputs = batch(names)
    out = model(inputs, mask, LABELS)
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    for b in range(4):  # a sample's logits do not depend on its batch
        alone = {m: {key: value[b : b + 1] for key, value in fields.items()} for m, fields in inputs.items()}
        torch.testing.assert_close(model(alone, mask[b : b + 1]).logits[0], out.logits[b], rtol=0, atol=1e-10)


def test_a_sample_with_nothing():
    with pytest.raises(ValueError, match="no modality"):
        build()(batch(), MASK & False)
