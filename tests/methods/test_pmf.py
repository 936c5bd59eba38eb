"""PMF equals its plain reference, absent rows never matter, and nothing below the fusion layers is kept or trained."""

import parity
import pytest
import rounded
import tiny_encoders
import torch
from running import CPU, moved, on
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from u2a_fast import PMF
from u2a_fast.lora import LoraLinear
from u2a_fast.reference import ReferencePMF

PAIR = {"image": "vit", "text": "bert"}
FAMILIES = {
    "pre and post norm": PAIR,
    "layer scale and causal": {"image": "dinov2", "text": "clip_text"},
    "mean-pooled": {"audio": "wav2vec2_stable", "image": "siglip_vision"},
    "padding on both sides": {"text": "electra", "audio": "hubert"},
    "three": {"image": "deit", "text": "roberta", "audio": "whisper"},
    "rotary, windows and gates": {"text": "modernbert", "image": "dinov3"},
    "rotary, causal, shared keys": {"image": "dinov3_gated", "text": "qwen3_windows"},
    "norms of updates and heads": {"text": "gemma3", "image": "dinov2_gated"},
}
COUNT = 6
LABELS = torch.arange(COUNT) % 5


def encoders(families, unequal=False):
    """Random encoders; `unequal`: the first is wider and deeper than the others."""
    first = {"hidden_size": 48, "num_hidden_layers": 3} if unequal else {}
    return {
        name: tiny_encoders.build(family, seed=i, **(first if i == 0 else {})).double()
        for i, (name, family) in enumerate(families.items())
    }


def models(families, device, unequal=False, **options):
    """`(fast, reference, names of what trains)`, with prompts large enough to be felt."""
    built = encoders(families, unequal)
    torch.manual_seed(0)
    reference = ReferencePMF(built, num_labels=5, **options).double()
    for name, parameter in reference.named_parameters():
        if "prompt" in name:
            torch.nn.init.normal_(parameter)
    fast = PMF(built, num_labels=5, **options).double().to(device)
    names = parity.share_named(fast, reference, ("layers", "head"))
    return fast, reference.to(device), [name for name in names if fast.get_parameter(name).requires_grad]


def assert_parity(fast, reference, names, inputs, present, device):
    fast.zero_grad()
    reference.zero_grad()
    out = on(device, fast)(**inputs, modality_mask=present, labels=LABELS)
    expected = on(device, reference)(inputs, present, LABELS)
    for name in ("logits", "task_loss", "loss"):
        parity.assert_close(getattr(out, name), getattr(expected, name), 1e-9, name)
    out.loss.backward()
    expected.loss.backward()
    for name in names:
        own, oracle = fast.get_parameter(name).grad, reference.get_parameter(name).grad
        if own is None:  # nothing hears it: what is said to a causal encoder
            assert oracle is None or not oracle.any(), name
        else:
            parity.assert_close(own, oracle, 1e-9, name)


@pytest.mark.slow
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES.keys())
def test_forward_loss_and_gradients_equal_the_reference(families, unequal, device):
    fast, reference, names = models(families, device, unequal)
    for seed in range(2):
        inputs, present = parity.batch(families, COUNT, seed), parity.random_presence(COUNT, len(families), seed)
        assert_parity(fast, reference, names, inputs, present, device)


@pytest.mark.parametrize(
    "options",
    [
        dict(fusion_layers=1),
        dict(fusion_context_prompts=0),
        dict(query_context_prompts=0, query_prompts=1),
        dict(fusion_context_prompts=0, query_context_prompts=0, query_prompts=3),
        dict(train_fusion_context=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("families", [PAIR, FAMILIES["layer scale and causal"]], ids=["all rows", "causal"])
def test_prompt_counts_and_depths(families, options, device):
    fast, reference, names = models(families, device, **options)
    assert options.get("train_fusion_context", True) or not any("fusion_context" in name for name in names)
    inputs, present = parity.batch(families, COUNT), parity.random_presence(COUNT, 2, 1)
    assert_parity(fast, reference, names, inputs, present, device)


@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_parameter_that_trains_has_a_gradient(families):
    """DDP would wait for it. What is said to a causal encoder (CLIP text) is heard by none of its tokens, so frozen."""
    model = PMF(encoders(families, False), num_labels=5).double().train()
    model(**parity.batch(families, COUNT), labels=LABELS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any(name.startswith("layers.0.") for name, p in model.named_parameters() if p.requires_grad)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("lost", [0, 1])
def test_a_modality_absent_in_the_whole_batch(lost, device):
    fast, reference, names = models(PAIR, device)
    present = torch.ones(COUNT, 2, dtype=torch.bool)
    present[:, lost] = False
    inputs = parity.batch(PAIR, COUNT)
    assert_parity(fast, reference, names, inputs, present, device)
    name = list(PAIR)[lost]
    without_keyword = on(device, fast)(**{m: v for m, v in inputs.items() if m != name}).logits
    parity.assert_close(
        without_keyword, on(device, reference)(inputs, present).logits, 1e-9, "logits without the keyword"
    )
    prompt = fast.layers[0][name].query_prompt  # it speaks for the missing modality
    assert prompt.grad.any() and not fast.head[name].weight.grad.any()


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_trainable_parameters_of_base_encoders():
    with torch.device("meta"):
        image = ViTModel(ViTConfig(), add_pooling_layer=False)
        text = BertModel(BertConfig(), add_pooling_layer=False)
        model = PMF({"image": image, "text": text}, num_labels=101, fusion_layers=2)
    trained, total = model.get_nb_trainable_parameters()
    d, h = 768, 384
    assert trained == 2 * (2 * d * 12 + 2 * (d * h + h + h * d + d)) + 2 * (d + 1) * 101 == 2_556_106
    assert round(100 * trained / total, 3) == 1.296


@pytest.mark.parametrize("families", [PAIR, FAMILIES["three"]], ids=["two", "three"])
def test_exported_names_and_what_trains(families):
    fast, reference, _ = models(families, CPU, unequal=True)
    exported, expected = fast.export_parameters(), reference.export_parameters()
    assert {name: p.shape for name, p in exported.items()} == {name: p.shape for name, p in expected.items()}
    assert not any(p.requires_grad for p in exported.values())
    trained = {name for name, p in fast.named_parameters() if p.requires_grad}
    assert trained == set(exported)
    assert all(any(word in name for word in ("prompt", "translator", "head")) for name in trained)
    if len(families) == 2:
        part = {f"translator.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
        part |= {"query_prompt", "query_context_prompt", "fusion_context_prompt"}
        assert {f"layers.1.text.{name}" for name in part} <= set(exported)
        assert exported["layers.0.text.translator.2.weight"].shape == (48, 24)
    else:
        assert exported["layers.0.text.translator.image.0.weight"].shape == (24, 32)


def test_prompts_start_small():
    model = PMF(encoders(PAIR), num_labels=5, query_prompts=400)
    assert abs(model.layers[0]["image"].query_prompt.std() - 0.02) < 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(fusion_layers=3), "fusion_layers=3, but image has 2 layers"),
        (dict(fusion_layers=0), "fusion_layers must be at least 1, not 0"),
        (dict(query_prompts=0), "query_prompts must be at least 1, not 0"),
        (dict(fusion_context_prompts=-1), "fusion_context_prompts must be at least 0, not -1"),
        (dict(all_absent="prior"), "all_absent"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        PMF(encoders(PAIR), num_labels=5, **options)


def saved_bytes(function) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        function()
    return sum(sizes)


def test_nothing_is_kept_below_the_fusion_layers():
    fast, _, _ = models(PAIR, CPU, unequal=True)
    inputs, present = parity.batch(PAIR, COUNT), torch.ones(COUNT, 2, dtype=torch.bool)
    assert saved_bytes(lambda: fast.encode(inputs, present)) == 0
    assert not any(packed.tokens.requires_grad for packed in fast.encode(inputs, present))
    assert saved_bytes(lambda: fast(**inputs, modality_mask=present)) > 0
    fast.encoders["image"].blocks[0].norm1.weight.requires_grad_(True)  # unless somebody unfreezes it
    fast(**inputs, labels=LABELS).loss.backward()
    assert fast.encoders["image"].blocks[0].norm1.weight.grad.any()


def test_a_fusion_layer_computes_keys_and_values_of_tokens_once(monkeypatch):
    """Rows that go through the fused q, k, v product of a fusion layer: tokens once, prompts once for all samples."""
    fast, _, _ = models(PAIR, CPU, fusion_layers=2)
    rows, qkv, project = [], fast.encoders["image"].blocks[0].qkv, LoraLinear.after_norm

    def counted(self, norm, x, **learned):
        rows.extend([x.shape[:2]] if self is qkv else [])
        return project(self, norm, x, **learned)

    monkeypatch.setattr(LoraLinear, "after_norm", counted)
    fast.encoders["image"].blocks[0].fc2.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:2]))
    fast(**parity.batch(PAIR, COUNT))
    tokens = 10
    qkv = [(COUNT, tokens), (1, 8), (1, 4), (COUNT, 4)]  # tokens; qcp and qp; fcp; messages
    mlp = [(COUNT, 4), (COUNT, tokens)]  # query prompts; tokens
    assert sorted(map(tuple, rows)) == sorted(qkv + mlp)


def test_the_last_fusion_layer_computes_class_tokens_alone():
    fast, _, _ = models(PAIR, CPU, fusion_layers=1)
    rows = {name: [] for name in PAIR}
    for name, encoder in fast.encoders.items():
        encoder.blocks[-1].fc2.register_forward_hook(lambda _, args, out, n=name: rows[n].append(args[0].shape[:2]))
    fast(**parity.batch(PAIR, COUNT))
    for name in PAIR:
        assert sorted(map(tuple, rows[name])) == [(1, COUNT), (COUNT, 4)]  # class tokens; query prompts


def test_train_mode_has_no_dropout(device):
    with_dropout = {name: tiny_encoders.build(family) for name, family in PAIR.items()}
    assert all(encoder.config.hidden_dropout_prob > 0 or name == "image" for name, encoder in with_dropout.items())
    model, inputs = PMF(with_dropout, num_labels=5).to(device), parity.batch(PAIR, COUNT, dtype=torch.float32)
    trained, evaluated = (on(device, model.train(mode))(**inputs).logits for mode in (True, False))
    assert torch.equal(trained, evaluated)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(device):
    fast, _, _ = models(PAIR, device)
    inputs, present = moved(parity.batch(PAIR, COUNT), device), parity.random_presence(COUNT, 2, 0)
    gradients, kept = [], []
    for checkpointed in (False, True):
        if checkpointed:
            fast.activation_checkpointing_enable()
        fast.zero_grad()
        kept.append(saved_bytes(lambda: fast.train()(**inputs, modality_mask=present)))
        on(device, fast)(**inputs, modality_mask=present, labels=LABELS).loss.backward()
        gradients.append([p.grad for p in fast.parameters() if p.requires_grad])
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_bf16_encoders_train_in_fp32_and_stay_bitwise_as_they_were(device):
    families = FAMILIES["three"]
    model = PMF({name: tiny_encoders.build(f).bfloat16() for name, f in families.items()}, num_labels=5).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start, optimizer = [p.clone() for p in trained], torch.optim.AdamW(trained, 1e-2)
    for step in range(3):
        inputs = parity.batch(families, COUNT, step, dtype=torch.float32)
        out = on(device, model)(**inputs, modality_mask=parity.random_presence(COUNT, 3, step), labels=LABELS)
        out.loss.backward()
        assert out.logits.dtype == torch.float32 and {p.grad.dtype for p in trained} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != old).any() for p, old in zip(trained, start, strict=True))
    assert frozen and all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype, device):
    model = PMF({name: tiny_encoders.build(family) for name, family in PAIR.items()}, num_labels=5).to(device)
    inputs = parity.batch(PAIR, COUNT, dtype=torch.float32)
    plain = on(device, model)(**inputs, labels=LABELS).loss
    with torch.autocast(device.type, dtype=dtype):
        loss = on(device, model)(**inputs, labels=LABELS).loss
    loss.backward()
    assert (loss - plain).abs() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_quantised_encoders_compute_with_the_rounded_weights(mode, device):
    if mode == "nf4":
        pytest.importorskip("bitsandbytes")
    quantised = PMF(encoders(PAIR), num_labels=5, quantization=mode).double().to(device)
    inputs, present, gradients = parity.batch(PAIR, COUNT), parity.random_presence(COUNT, 2, 0), []
    models = quantised, rounded.dequantised(quantised)
    logits = [on(device, model)(**inputs, modality_mask=present).logits for model in models]
    parity.assert_close(*logits, 1e-9, "logits")
    for model, own in zip(models, logits, strict=True):
        own.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        parity.assert_close(gradient, gradients[1][name], 1e-9, name)
