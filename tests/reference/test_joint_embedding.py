"""ReferenceJointEmbedding and its VICReg against hand-written formulas."""

import pytest
import tiny_encoders
import torch

from u2a_fast.reference.joint_embedding import ReferenceJointEmbedding, vicreg

PAIR = {"image": "vit", "text": "bert"}
MASK = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, True]])
LABELS = torch.tensor([0, 2, 1, 1, 0])


def build(names=PAIR, **arguments) -> ReferenceJointEmbedding:
    torch.manual_seed(0)
    widths = {"text": 48}
    return ReferenceJointEmbedding(tiny_encoders.build_many(names, widths=widths), num_labels=3, **arguments).double()


def batch(names=PAIR, size=5):
    return tiny_encoders.inputs_many(names, size, padded=True, dtype=torch.float64)


def test_vicreg_by_scalar_loops():
    p, r = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    n, d = p.shape
    average = [sum(p[s, i] for s in range(n)) / n for i in range(d)]
    cov = [
        [sum((p[s, i] - average[i]) * (p[s, k] - average[k]) for s in range(n)) / (n - 1) for k in range(d)]
        for i in range(d)
    ]
    invariance = sum((p[s, i] - r[s, i]) ** 2 for s in range(n) for i in range(d)) / (n * d)
    variance = sum(max(0, 1 - (cov[i][i] + 1e-4) ** 0.5) for i in range(d)) / d
    covariance = sum(cov[i][k] ** 2 for i in range(d) for k in range(d) if i != k) / d
    torch.testing.assert_close(vicreg(p, r), 25 * invariance + 25 * variance + covariance)


def test_vicreg_of_fewer_than_two_samples_is_a_connected_zero():
    predicted = torch.randn(1, 3, requires_grad=True)
    loss = vicreg(predicted, torch.randn(1, 3))
    loss.backward()
    assert loss == 0 and torch.equal(predicted.grad, torch.zeros(1, 3))


def test_vicreg_is_computed_in_float32_and_gives_the_target_no_gradient():
    predicted = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    real = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = vicreg(predicted, real)
    loss.backward()
    assert loss.dtype == torch.float32 and real.grad is None and predicted.grad.any()
    assert vicreg(predicted.double(), real.double()).dtype == torch.float64


def test_forward_by_hand():
    model, inputs = build(), batch()
    e_image, r_image = model.encoders["image"].read(inputs["image"], model.prompts["image"], read_only=True)
    e_text, r_text = model.encoders["text"].read(inputs["text"], model.prompts["text"], read_only=True)
    predicted_text = model.predictor["image"]["text"](r_image.mean(dim=1))
    predicted_image = model.predictor["text"]["image"](r_text.mean(dim=1))
    both = [0, 3, 4]
    align = vicreg(predicted_text[both], e_text[both]) + vicreg(predicted_image[both], e_image[both])
    image, text = e_image.clone(), e_text.clone()
    image[2], text[1] = predicted_image[2], predicted_text[1]
    logits = model.head(torch.cat([image, text], dim=1))
    out = model(inputs, MASK, LABELS)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(out.align_loss, align, rtol=0, atol=1e-10)
    task = torch.nn.functional.cross_entropy(logits, LABELS)
    torch.testing.assert_close(out.loss, task + 0.1 * align, rtol=0, atol=1e-10)


def test_real_embeddings_do_not_depend_on_the_prompts():
    """Complete samples are classified from ordinary rows, which never see a read-only prompt."""
    model, inputs = build(), batch()
    before = model(inputs).logits
    for prompts in model.prompts.values():
        torch.nn.init.normal_(prompts)
    torch.testing.assert_close(model(inputs).logits, before, rtol=0, atol=1e-12)


def test_bitfit_trains_every_bias_of_the_layers_and_nothing_else_of_the_encoders():
    model = build().train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("encoders.")}
    biases = {
        n for n, _ in model.named_parameters() if n.endswith("bias") and ".layer" in n and "layernorm.bias" not in n
    }
    assert trained == biases and len(trained) == 2 * 2 * 8  # encoders x layers x (six linears, two LayerNorms)
    model(batch(), MASK, LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_several_sources_are_averaged():
    names = {"image": "vit", "text": "bert", "audio": "ast"}
    tuning = {"r": 2, "lora_alpha": 4, "target_modules": ("q", "v")}
    model = build(names, tuning=tuning, late_fusion="average")
    inputs, mask = batch(names), torch.ones(5, 3, dtype=torch.bool)
    mask[1, 2] = False
    real, predicted = model.encode(inputs, mask)
    expected = (predicted["image", "audio", 1] + predicted["text", "audio", 1]) / 2
    torch.testing.assert_close(model.embedding("audio", 1, real, predicted), expected)
    heads = [model.head["image"](real["image", 1]), model.head["text"](real["text", 1]), model.head["audio"](expected)]
    torch.testing.assert_close(model(inputs, mask).logits[1], sum(heads) / 3)


def test_a_sample_with_nothing():
    mask = MASK.clone()
    mask[0] = False
    with pytest.raises(ValueError, match="no modality"):
        build()(batch(), mask)
