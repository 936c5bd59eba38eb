"""JointEmbedding equals its plain reference; prompts are seen by nobody; predictions stand in exactly where needed."""

import parity
import pytest
import rounded
import tiny_encoders
import torch
from running import moved, on

from u2a_fast import JointEmbedding, LoraConfig
from u2a_fast.methods.joint_embedding import vicreg
from u2a_fast.padding import padding_of
from u2a_fast.reference import ReferenceJointEmbedding
from u2a_fast.reference import joint_embedding as reference_module

PAIR = {"image": "vit", "text": "bert"}
FAMILIES = {
    "pre and post norm": PAIR,
    "layer scale and causal": {"text": "clip_text", "image": "dinov2"},
    "mean-pooled": {"audio": "wav2vec2_stable", "image": "siglip_vision"},
    "padding on both sides": {"text": "electra", "audio": "hubert"},
    "three": {"image": "deit", "text": "roberta", "audio": "whisper"},
    "rotary, windows and gates": {"text": "modernbert", "image": "dinov3"},
    "rotary, causal, shared keys": {"image": "dinov3_gated", "text": "qwen3_windows"},
    "norms of updates and heads": {"text": "gemma3", "image": "dinov2_gated"},
}
WITHOUT_BIASES = ("eurobert", "mistral", "qwen3", "qwen3_windows", "gemma3", "embedding_gemma")
ROLES = ("q", "k", "v", "o", "fc1", "fc2")
COUNT = 6
LABELS = torch.arange(COUNT) % 5


def encoders(families, unequal=False):
    """Random encoders, biased as BitFit needs them; `unequal`: the first is wider and deeper than the others."""
    first = {"hidden_size": 48, "num_hidden_layers": 3} if unequal else {}
    biased = {family: {"attention_bias": True} for family in WITHOUT_BIASES}
    return {
        name: tiny_encoders.build(family, seed=i, **biased.get(family, {}), **(first if i == 0 else {})).double()
        for i, (name, family) in enumerate(families.items())
    }


def models(families, device, unequal=False, tuning="bitfit", fusion="concat"):
    """`(fast, reference, names of prompts, predictors and heads)`; LoRA factors equal and random."""
    built = encoders(families, unequal)
    torch.manual_seed(0)
    reference = ReferenceJointEmbedding(built, num_labels=5, tuning=tuning, late_fusion=fusion).double()
    for prompts in reference.prompts.values():
        torch.nn.init.normal_(prompts)
    lora = tuning if tuning == "bitfit" else LoraConfig(**tuning)
    fast = JointEmbedding(built, num_labels=5, tuning=lora, fusion=fusion).double().to(device)
    if tuning != "bitfit":
        reference.lora_factors = lambda: {
            (m, *key): factors for m, e in reference.encoders.items() for key, factors in e.lora_factors().items()
        }
        parity.share_factors(fast, reference)
    return fast, reference.to(device), parity.share_named(fast, reference, ("prompts", "predictor", "head"))


def assert_same_bias_gradients(fast, reference):
    for modality, oracle in reference.encoders.items():
        compared = 0
        for index, block in enumerate(fast.encoders[modality].blocks):
            named = {"norm1": block.norm1, "norm2": block.norm2}
            named = {name: norm.bias.grad for name, norm in named.items() if norm is not None and norm.bias is not None}
            for linear in block.linears:
                if linear.bias is not None:
                    named |= dict(zip(linear.roles, linear.bias.grad.split(list(linear.widths)), strict=True))
            for name, gradient in named.items():
                expected = oracle.part(index, name).bias.grad
                parity.assert_close(gradient, expected, 1e-9, f"bias of {modality} {index} {name}")
                compared += 1
        assert compared == sum(p.requires_grad for p in oracle.layers.parameters())


def assert_parity(fast, reference, names, inputs, present, device):
    fast.zero_grad()
    reference.zero_grad()
    out = on(device, fast)(**inputs, modality_mask=present, labels=LABELS)
    expected = on(device, reference)(inputs, present, LABELS)
    for name in ("logits", "task_loss", "align_loss", "loss"):
        parity.assert_close(getattr(out, name), getattr(expected, name), 1e-9, name)
    out.loss.backward()
    expected.loss.backward()
    parity.assert_same_gradients(fast, reference, names, 1e-8)
    if any(p.requires_grad for p in reference.encoders.parameters()) and not hasattr(reference, "lora_factors"):
        assert_same_bias_gradients(fast, reference)


@pytest.mark.parametrize("fusion", ["concat", "average"])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES.keys())
def test_forward_losses_and_every_gradient_equal_the_reference(families, unequal, fusion, device):
    fast, reference, names = models(families, device, unequal, fusion=fusion)
    for seed in range(2):
        inputs, present = parity.batch(families, COUNT, seed), parity.random_presence(COUNT, len(families), seed)
        assert_parity(fast, reference, names, inputs, present, device)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), ("q", "v"), ROLES], ids=str)
@pytest.mark.parametrize("families", [PAIR, FAMILIES["three"]], ids=["two", "three"])
def test_lora_instead_of_bitfit(families, targets, device):
    tuning = {"r": 3, "lora_alpha": 6, "target_modules": targets}
    fast, reference, names = models(families, device, unequal=True, tuning=tuning)
    assert not any(p.requires_grad for n, p in fast.named_parameters() if "encoders" in n and n.endswith("bias"))
    inputs, present = parity.batch(families, COUNT), parity.random_presence(COUNT, len(families), 1)
    assert_parity(fast, reference, names, inputs, present, device)


@pytest.mark.slow
def test_pefts_config_is_read():
    from peft import LoraConfig as PeftConfig

    model = JointEmbedding(encoders(PAIR), num_labels=5, tuning=PeftConfig(r=2, target_modules=["query", "value"]))
    assert model.config.arguments["tuning"]["target_modules"] == ["q", "v"]


@pytest.mark.parametrize("kind", ["left", "holes"])
@pytest.mark.parametrize("family", ["bert", "clip_text", "modernbert", "gemma3"])
def test_padding_anywhere(family, kind, device):
    families = {"image": "vit", "text": family}
    fast, reference, names = models(families, device)
    inputs = parity.batch(families, COUNT, padded=False)
    mask = inputs["text"]["attention_mask"]
    if kind == "left":
        mask[1, :3] = mask[2, :1] = 0
    else:
        mask[1, 2] = mask[4, 1] = mask[4, 3] = 0
    assert_parity(fast, reference, names, inputs, torch.ones(COUNT, 2, dtype=torch.bool), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_ordinary_rows_are_bitwise_what_they_are_without_prompts(family, dtype, device):
    other = "vit" if family != "vit" else "bert"
    built = {"a": tiny_encoders.build(family).to(dtype), "b": tiny_encoders.build(other)}
    tuning = LoraConfig(r=2) if family in WITHOUT_BIASES else "bitfit"
    model = JointEmbedding(built, num_labels=2, tuning=tuning).to(device)
    encoder, inputs = model.encoders["a"], moved(tiny_encoders.inputs(family, 3, padded=True), device)
    with torch.no_grad():
        tokens, padding_mask = encoder.embed(**inputs)
        alone = encoder.read(tokens, padding_of(padding_mask))[0].float()
        beside = model.encode({"a": inputs}, torch.tensor([[True, False]] * 3)).class_tokens[0]
    assert torch.equal(alone, beside)


def test_prompts_see_neither_each_other_nor_themselves(device):
    """A prompt's row with all the others there is the row it has alone."""
    fast, _, _ = models(PAIR, device)
    inputs = moved(parity.batch(PAIR, COUNT), device)
    together = fast.prompts["text"].detach().clone()
    tokens, mask = fast.encoders["text"].embed(**inputs["text"])
    padding = padding_of(mask)
    rows = []
    for i in range(len(together)):
        fast.prompts["text"] = torch.nn.Parameter(together[i : i + 1])
        rows.append(fast.read("text", tokens, padding)[1])
    fast.prompts["text"] = torch.nn.Parameter(together)
    parity.assert_close(fast.read("text", tokens, padding)[1], torch.stack(rows).mean(dim=0), 1e-12, "mean of prompts")


def test_what_stands_in_absent_rows_never_matters(device):
    families = FAMILIES["three"]
    fast, _, _ = models(families, device)
    present, results = parity.random_presence(COUNT, 3, 3), []
    for fill in (0.0, float("nan"), float("inf")):
        inputs = parity.batch(families, COUNT)
        for i, values in enumerate(inputs.values()):
            for tensor in values.values():
                junk = fill if tensor.is_floating_point() else (0 if fill == 0 else 10**6)
                tensor[~present[:, i]] = torch.tensor(junk).to(tensor.dtype)
        fast.zero_grad()
        out = on(device, fast)(**inputs, modality_mask=present, labels=LABELS)
        out.loss.backward()
        results.append([out.logits, out.loss, *(p.grad for p in fast.parameters() if p.requires_grad)])
    assert all(torch.isfinite(t).all() for t in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_predictions_stand_in_exactly_where_a_modality_is_absent(device):
    fast, _, _ = models(FAMILIES["three"], device)
    inputs, natural = moved(parity.batch(FAMILIES["three"], COUNT), device), torch.ones(COUNT, 3, dtype=torch.bool)
    seen = []
    fast.classify = lambda embeddings: seen.append(embeddings) or torch.zeros(COUNT, 5)
    present = parity.random_presence(COUNT, 3, 2)
    encoded = fast.encode(inputs, natural)
    fast.fuse(encoded, present)
    for j, target in enumerate(FAMILIES["three"]):
        for b in range(COUNT):
            if present[b, j]:
                expected = encoded.class_tokens[j][b]
            else:
                sources = [m for i, m in enumerate(FAMILIES["three"]) if present[b, i]]
                readings = [encoded.read[list(FAMILIES["three"]).index(m)][b] for m in sources]
                predicted = [fast.predictor[m][target](r) for m, r in zip(sources, readings, strict=True)]
                expected = torch.stack(predicted).mean(dim=0)
            parity.assert_close(seen[0][j][b], expected, 1e-12, f"{target} of sample {b}")


@pytest.mark.parametrize("paired", [0, 1, 2])
def test_vicreg_with_few_paired_rows(paired, device):
    fast, reference, names = models(PAIR, device)
    present = torch.tensor([[True, False], [False, True]] * 3)
    present[:paired] = True
    inputs = parity.batch(PAIR, COUNT)
    assert_parity(fast, reference, names, inputs, present, device)
    out = on(device, fast)(**inputs, modality_mask=present, labels=LABELS)
    assert out.align_loss.isfinite() and (out.align_loss == 0) == (paired < 2) and out.align_loss.requires_grad
    out.align_loss.backward()


def test_vicreg_equals_the_reference_and_leaves_the_target_alone(device):
    predicted, real = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, expected = on(device, vicreg)(predicted, real), reference_module.vicreg(predicted, real)
    parity.assert_close(loss, expected, 1e-12, "loss")
    gradients = [torch.autograd.grad(value, predicted)[0] for value in (loss, expected)]
    parity.assert_close(*gradients, 1e-12, "gradient")
    assert torch.autograd.grad(vicreg(predicted, real), real, allow_unused=True) == (None,)


def test_vicreg_is_computed_in_fp32_at_least(device):
    predicted, real = torch.randn(16, 32) / 2, torch.zeros(16, 32)
    expected = vicreg(predicted.double(), real.double())
    assert expected.dtype == torch.float64
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = on(device, vicreg)(predicted, real)
    assert loss.dtype == torch.float32 and (loss - expected).abs() < 1e-6 * expected
    assert vicreg(predicted.bfloat16(), real.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("lost", [0, 1])
def test_a_modality_absent_in_the_whole_batch(lost, device):
    fast, reference, _ = models(PAIR, device)
    present = torch.ones(COUNT, 2, dtype=torch.bool)
    present[:, lost] = False
    inputs = parity.batch(PAIR, COUNT)
    out = on(device, fast)(**inputs, modality_mask=present, labels=LABELS)
    parity.assert_close(out.logits, on(device, reference)(inputs, present).logits, 1e-9, "logits")
    out.loss.backward()
    name = list(PAIR)[lost]
    without_keyword = on(device, fast)(**{m: v for m, v in inputs.items() if m != name})
    parity.assert_close(without_keyword.logits, out.logits, 1e-12, "logits without the keyword")


def test_one_encoding_serves_every_scenario(device):
    families = FAMILIES["three"]
    fast, _, _ = models(families, device, unequal=True)
    inputs, natural = parity.batch(families, COUNT), torch.ones(COUNT, 3, dtype=torch.bool)
    natural[1, 0] = natural[4, 2] = False
    with torch.no_grad():
        encoded = fast.encode(moved(inputs, device), natural)
        for seed in range(4):
            kept = natural & parity.random_presence(COUNT, 3, seed)
            counted = kept.any(dim=1)  # a scenario may leave a sample nothing: its row is finite and does not count
            logits, _ = fast.fuse(encoded, kept)
            chosen = {m: {k: v[counted] for k, v in values.items()} for m, values in inputs.items()}
            expected = on(device, fast)(**chosen, modality_mask=kept[counted]).logits
            parity.assert_close(logits[counted], expected, 1e-12, "logits")
            assert logits.isfinite().all()


def test_rows_do_not_see_each_other(device):
    families = FAMILIES["three"]
    fast, _, _ = models(families, device)
    inputs, present = parity.batch(families, COUNT), parity.random_presence(COUNT, 3, 5)
    run = on(device, fast)
    logits = run(**inputs, modality_mask=present).logits
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    shuffled = {m: {k: v[order] for k, v in values.items()} for m, values in inputs.items()}
    parity.assert_close(run(**shuffled, modality_mask=present[order]).logits, logits[order], 1e-12, "permuted")
    single = {m: {k: v[2:3] for k, v in values.items()} for m, values in inputs.items()}
    parity.assert_close(run(**single, modality_mask=present[2:3]).logits, logits[2:3], 1e-12, "alone")


def test_the_callers_model_keeps_its_biases():
    given = encoders(PAIR)
    before = {m: {n: p.clone() for n, p in e.named_parameters()} for m, e in given.items()}
    model = JointEmbedding(given, num_labels=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    for m, encoder in given.items():
        assert all(torch.equal(p, before[m][n]) for n, p in encoder.named_parameters())


def test_gradient_checkpointing_changes_nothing(device):
    fast, _, _ = models(PAIR, device)
    inputs, present = parity.batch(PAIR, COUNT), parity.random_presence(COUNT, 2, 0)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            fast.activation_checkpointing_enable()
        fast.train().zero_grad()
        on(device, fast)(**inputs, modality_mask=present, labels=LABELS).loss.backward()
        gradients.append([p.grad for p in fast.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip_vision", "ast"])
def test_prompts_start_near_the_class_embedding(family):
    given = tiny_encoders.build(family)
    embedding = next(p for n, p in given.named_parameters() if n.endswith(("cls_token", "class_embedding")))
    model = JointEmbedding({"image": given, "text": tiny_encoders.build("bert")}, num_labels=5, read_only_prompts=3)
    away = (model.prompts["image"] - embedding.view(1, -1)).norm(dim=1)
    torch.testing.assert_close(away, torch.full((3,), 0.1))
    assert 0 < model.prompts["text"].std() < 0.04


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tuning="prefix"), "tuning must be"),
        (dict(fusion="sum"), "fusion must be one of"),
        (dict(read_only_prompts=0), "read_only_prompts must be at least 1"),
        (dict(all_absent="prior"), "all_absent"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        JointEmbedding(encoders(PAIR), num_labels=5, **options)


@pytest.mark.parametrize("family, options", [("qwen3", {}), ("modernbert", {"norm_bias": False})])
def test_bitfit_of_an_encoder_without_biases_is_refused(family, options):
    given = {"image": tiny_encoders.build("vit"), "text": tiny_encoders.build(family, **options)}
    with pytest.raises(
        ValueError, match=r"would train nothing in a \w+ encoder, which has no biases: pass tuning=LoraConfig"
    ):
        JointEmbedding(given, num_labels=5)
    assert JointEmbedding(given, num_labels=5, tuning=LoraConfig(r=2))


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_quantised_encoders_compute_with_the_rounded_weights(mode, device):
    quantised = JointEmbedding(encoders(PAIR), num_labels=5, quantization=mode).double().to(device)
    inputs, present, gradients = parity.batch(PAIR, COUNT), parity.random_presence(COUNT, 2, 0), []
    models = quantised, rounded.dequantised(quantised)
    losses = [on(device, model)(**inputs, modality_mask=present, labels=LABELS).loss for model in models]
    parity.assert_close(*losses, 1e-9, "loss")
    for model, loss in zip(models, losses, strict=True):
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        parity.assert_close(gradient, gradients[1][name], 1e-9, name)
