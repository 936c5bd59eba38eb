"""U2A equals its plain reference, absent rows never matter, and what trains is what the paper trains."""

import parity
import pytest
import tiny_encoders
import torch
from running import on

from u2a_fast import U2A, LoraConfig
from u2a_fast.reference import ReferenceU2A

PAIRS = {
    "pre and post norm": {"image": "vit", "text": "bert"},
    "layer scale and causal": {"text": "clip_text", "image": "dinov2"},
    "mean-pooled": {"audio": "wav2vec2_stable", "image": "siglip_vision"},
    "three": {"image": "deit", "text": "roberta", "audio": "whisper"},
    "rotary, windows and gates": {"text": "modernbert", "image": "dinov3"},
    "rotary, causal, shared keys": {"image": "dinov3_gated", "text": "qwen3_windows"},
    "norms of updates and heads": {"text": "gemma3", "image": "dinov2_gated"},
}
COUNT = 6
HEADS = {  # what stands between encoders and logits, all translated by default
    "the paper's": {"translate_all": False},
    "translators": {},
    "separate heads": {"translate_all": False, "separate_heads": True},
    "separate heads behind translators": {"separate_heads": True},
}


def models(families, device, unequal=False, targets=("q", "k", "v", "o"), translate_all=True, **options):
    built = {}
    for i, (name, family) in enumerate(families.items()):
        built[name] = tiny_encoders.build(
            family, seed=i, **({"hidden_size": 48} if unequal and i == 0 else {})
        ).double()
    torch.manual_seed(0)
    options["translate_all"] = translate_all
    reference = ReferenceU2A(built, num_labels=5, r=3, lora_alpha=6, target_modules=targets, **options).double()
    for translator in reference.translators.values():
        torch.nn.init.normal_(translator.weight, std=0.2)  # no identity, behind which it could be forgotten
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    fast = U2A(built, num_labels=5, lora=lora, modality_dropout=0.0, **options).double().to(device)
    parity.share_factors(fast, reference)
    names = parity.share_named(fast, reference, ("mask_tokens", "translators", "head"))
    return fast, reference.to(device), names


@pytest.mark.parametrize("absent", ["pack", "where"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("families", PAIRS.values(), ids=PAIRS.keys())
def test_forward_loss_and_gradients_equal_the_reference(families, unequal, heads, absent, device):
    fast, reference, names = models(families, device, unequal, **heads)
    translated = families if heads.get("translate_all", True) else list(families)[1:] if unequal else []
    assert list(fast.translators) == list(reference.translators) == list(translated)
    fast.absent = absent
    labels = torch.arange(COUNT) % 5
    for seed in range(2):
        inputs, present = parity.batch(families, COUNT, seed), parity.random_presence(COUNT, len(families), seed)
        fast.zero_grad()
        reference.zero_grad()
        out = on(device, fast)(**inputs, modality_mask=present, labels=labels)
        expected = on(device, reference)(inputs, present, labels)
        for name in ("logits", "task_loss", "align_loss", "loss"):
            parity.assert_close(getattr(out, name), getattr(expected, name), 1e-9, name)
        out.loss.backward()
        expected.loss.backward()
        parity.assert_same_gradients(fast, reference, names, 1e-9)


@pytest.mark.parametrize("absent", ["pack", "where"])
@pytest.mark.parametrize("kind", ["left", "holes"])
@pytest.mark.parametrize("family", ["bert", "clip_text", "modernbert", "gemma3"])
def test_padding_anywhere(family, kind, absent, device):
    families = {"image": "vit", "text": family}
    fast, reference, names = models(families, device)
    fast.absent = absent
    inputs, present = parity.batch(families, COUNT, padded=False), parity.random_presence(COUNT, 2, 1)
    mask, labels = inputs["text"]["attention_mask"], torch.arange(COUNT) % 5
    if kind == "left":
        mask[1, :3] = mask[2, :1] = 0
    else:
        mask[1, 2] = mask[4, 1] = mask[4, 3] = 0
    out = on(device, fast)(**inputs, modality_mask=present, labels=labels)
    expected = on(device, reference)(inputs, present, labels)
    parity.assert_close(out.logits, expected.logits, 1e-9, "logits")
    out.loss.backward()
    expected.loss.backward()
    parity.assert_same_gradients(fast, reference, names, 1e-9)


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("fc1", "fc2"), ("q", "k", "v", "o", "fc1", "fc2")])
def test_any_roles_can_be_adapted(targets, device):
    families = PAIRS["pre and post norm"]
    fast, reference, names = models(families, device, targets=targets)
    inputs, present = parity.batch(families, COUNT), parity.random_presence(COUNT, 2, 1)
    labels = torch.arange(COUNT) % 5
    out = on(device, fast)(**inputs, modality_mask=present, labels=labels)
    expected = on(device, reference)(inputs, present, labels)
    parity.assert_close(out.logits, expected.logits, 1e-9, "logits")
    out.loss.backward()
    expected.loss.backward()
    parity.assert_same_gradients(fast, reference, names, 1e-9)


@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("absent", ["pack", "where"])
def test_what_stands_in_absent_rows_never_matters(absent, separate_heads, device):
    families = PAIRS["three"]
    fast, _, _ = models(families, device, separate_heads=separate_heads)
    fast.absent = absent
    present, labels = parity.random_presence(COUNT, 3, 3), torch.arange(COUNT) % 5
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        inputs = parity.batch(families, COUNT)
        for i, values in enumerate(inputs.values()):
            for tensor in values.values():
                junk = fill if tensor.is_floating_point() else (0 if fill == 0 else 10**6)
                tensor[~present[:, i]] = torch.tensor(junk).to(tensor.dtype)
        fast.zero_grad()
        out = on(device, fast)(**inputs, modality_mask=present, labels=labels)
        out.loss.backward()
        results.append([out.logits, out.loss, *(p.grad for p in fast.parameters() if p.requires_grad)])
    assert all(torch.isfinite(t).all() for t in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("absent", ["pack", "where"])
def test_a_modality_absent_in_the_whole_batch(absent, separate_heads, lost, device):
    families = PAIRS["pre and post norm"]
    fast, reference, _ = models(families, device, separate_heads=separate_heads)
    fast.absent = absent
    present = torch.ones(COUNT, 2, dtype=torch.bool)
    present[:, lost] = False
    inputs = parity.batch(families, COUNT)
    out = on(device, fast)(**inputs, modality_mask=present, labels=torch.zeros(COUNT, dtype=torch.long))
    parity.assert_close(out.logits, on(device, reference)(inputs, present).logits, 1e-9, "logits")
    out.loss.backward()
    assert out.align_loss == 0
    name = list(families)[lost]
    without_keyword = on(device, fast)(**{m: v for m, v in inputs.items() if m != name})
    parity.assert_close(without_keyword.logits, out.logits, 1e-12, "logits without the keyword")
    lora = [p.grad for n, p in fast.named_parameters() if n.startswith(f"encoders.{name}.") and p.requires_grad]
    assert lora and all(g is not None and not g.any() for g in lora)


@pytest.mark.parametrize("separate_heads", [False, True])
def test_rows_do_not_see_each_other(separate_heads, device):
    families = PAIRS["three"]
    fast, _, _ = models(families, device, separate_heads=separate_heads)
    inputs, present = parity.batch(families, COUNT), parity.random_presence(COUNT, 3, 5)
    run = on(device, fast)
    logits = run(**inputs, modality_mask=present).logits
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    shuffled = {m: {k: v[order] for k, v in values.items()} for m, values in inputs.items()}
    parity.assert_close(run(**shuffled, modality_mask=present[order]).logits, logits[order], 1e-12, "permuted")
    single = {m: {k: v[2:3] for k, v in values.items()} for m, values in inputs.items()}
    parity.assert_close(run(**single, modality_mask=present[2:3]).logits, logits[2:3], 1e-12, "alone")


@pytest.mark.slow
@pytest.mark.parametrize("name, separate_heads", [(name, name == "three") for name in PAIRS])
def test_static_shapes_compile_as_one_graph(name, separate_heads, device):
    """`absent="where"`, in training, with gradients; aot_eager traces backward too. Heads do not see the encoders."""
    torch._dynamo.reset()
    families = PAIRS[name]
    fast, _, _ = models(families, device, separate_heads=separate_heads)
    fast.absent = "where"
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    inputs, labels = parity.batch(families, COUNT), torch.arange(COUNT) % 5
    for seed in range(5):
        present = parity.random_presence(COUNT, len(families), seed)
        results = []
        for model in (fast, compiled):
            fast.zero_grad()
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                out = on(device, model)(**inputs, modality_mask=present, labels=labels)
            out.loss.backward()
            gradients = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
            results.append({"logits": out.logits, "loss": out.loss, **gradients})
        eager, graph = results
        assert eager.keys() == graph.keys()
        for key, value in eager.items():
            parity.assert_close(graph[key], value, 1e-9, key)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_prior_for_a_sample_with_nothing(heads, device):
    families = PAIRS["pre and post norm"]
    fast, reference, names = models(families, device, unequal=True, all_absent="prior", **heads)
    present = torch.tensor([[True, True], [False, False], [False, True]])
    inputs, labels = parity.batch(families, 3), torch.tensor([0, 1, 2])
    out = on(device, fast)(**inputs, modality_mask=present, labels=labels)
    expected = on(device, reference)(inputs, present, labels)
    parity.assert_close(out.logits, expected.logits, 1e-9, "logits")
    out.loss.backward()
    expected.loss.backward()
    parity.assert_same_gradients(fast, reference, names, 1e-9)


def test_modality_dropout_takes_one_modality_and_never_the_last(device):
    fast, _, _ = models(PAIRS["three"], device)
    fast.modality_dropout = 0.5
    present = parity.random_presence(3000, 3, 0)
    torch.manual_seed(0)
    kept = on(device, fast.drop_modalities)(present)
    lost = present.sum(1) - kept.sum(1)
    assert not (kept & ~present).any() and kept.any(1).all() and set(lost.tolist()) == {0, 1}
    assert lost[present.sum(1) == 1].max() == 0
    assert lost[present.sum(1) > 1].float().mean().sub(0.5).abs() < 0.05
    shares = (present & ~kept)[present.all(1)].float().mean(0)
    assert (shares - 0.5 / 3).abs().max() < 0.05


@pytest.mark.parametrize("absent", ["pack", "where"])
def test_translators_start_from_the_papers_plain_sum(absent, device):
    families = PAIRS["three"]
    plain, translated = (
        U2A(tiny_encoders.build_many(families), num_labels=5, translate_all=choice, absent=absent).double().eval()
        for choice in (False, True)
    )
    assert len(plain.translators) == 0
    translated.load_state_dict(plain.state_dict(), strict=False)
    inputs, labels = parity.batch(families, COUNT), torch.arange(COUNT) % 5
    expected, got = (on(device, model.to(device))(**inputs, labels=labels) for model in (plain, translated))
    for name in ("logits", "loss", "align_loss"):
        parity.assert_close(getattr(got, name), getattr(expected, name), 1e-9, name)


@pytest.mark.parametrize("separate_heads", [False, True])
def test_separate_heads_do_not_ask_how_large_class_tokens_are(separate_heads, device):
    """DINOv2's are four times MiniLM's; in the paper's sum the larger drown the smaller."""
    families = PAIRS["pre and post norm"]
    fast, _, _ = models(families, device, separate_heads=separate_heads, translate_all=False)
    inputs = parity.batch(families, COUNT)
    before = on(device, fast)(**inputs).logits
    for parameter in fast.encoders["image"].stem["final_norm"].parameters():
        parameter.mul_(4)
    after = on(device, fast)(**inputs).logits
    assert ((after - before).abs().max() < 1e-3) == separate_heads


@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("translate_all", [False, True])
def test_what_trains_is_lora_mask_tokens_translators_and_head(translate_all, separate_heads):
    encoders = {name: tiny_encoders.build(family) for name, family in PAIRS["pre and post norm"].items()}
    ways = {"translate_all": translate_all, "separate_heads": separate_heads}
    model = U2A(encoders, num_labels=5, lora=LoraConfig(r=2), **ways)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(word in name for word in ("lora", "mask_token", "translators", "head")) for name in trained)
    beside = 2 * (32 * 32 + 32) if translate_all else 0
    head = 5 * 32 * (2 if separate_heads else 1) + 5
    assert sum(p.numel() for name, p in trained.items() if "lora" not in name) == head + 2 * 32 + beside
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum(p.numel() for name, p in trained.items() if "lora" in name) == 2 * 2 * 4 * 2 * (32 + 32)


def test_trainable_line_is_pefts(capsys):
    encoders = {name: tiny_encoders.build(family) for name, family in PAIRS["pre and post norm"].items()}
    model = U2A(encoders, num_labels=5)
    model.print_trainable_parameters()
    trained, total = model.get_nb_trainable_parameters()
    expected = f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    assert capsys.readouterr().out == expected


def test_bf16_encoders_compute_in_bf16_and_train_in_fp32(device):
    encoders = {name: tiny_encoders.build(f).bfloat16() for name, f in PAIRS["pre and post norm"].items()}
    model = U2A(encoders, num_labels=5).eval().to(device)
    inputs = parity.batch(PAIRS["pre and post norm"], 3, dtype=torch.float32)
    assert on(device, model.encoders["image"])(**inputs["image"]).dtype == torch.bfloat16
    out = on(device, model)(**inputs, labels=torch.tensor([0, 1, 2]))
    out.loss.backward()
    assert out.logits.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad and p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype, device):
    encoders = {name: tiny_encoders.build(family) for name, family in PAIRS["pre and post norm"].items()}
    model = U2A(encoders, num_labels=5, modality_dropout=0.0).to(device)
    inputs, labels = parity.batch(PAIRS["pre and post norm"], 3, dtype=torch.float32), torch.tensor([0, 1, 2])
    plain = on(device, model)(**inputs, labels=labels).loss
    with torch.autocast(device.type, dtype=dtype):
        loss = on(device, model)(**inputs, labels=labels).loss
    loss.backward()
    assert (loss - plain).abs() < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_a_backward_inside_autocast_follows_its_forward_outside(device):
    families = PAIRS["pre and post norm"]
    built = {name: tiny_encoders.build(family) for name, family in families.items()}
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_dropout=0.1, target_modules=("q", "v", "fc2"))
    model = U2A(built, num_labels=5, lora=lora, modality_dropout=0.0).to(device)
    inputs = {name: tiny_encoders.inputs(family, COUNT) for name, family in families.items()}
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        loss = on(device, model)(**inputs, labels=torch.arange(COUNT) % 5).loss
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, around = gradients
    lora = [name for name in plain if "lora" in name]
    assert lora and all(p.isfinite().all() for p in around.values())
    assert plain.keys() == around.keys()
    for name in lora:
        torch.testing.assert_close(around[name], plain[name], rtol=0.05, atol=1e-3)


def test_frozen_weights_stay_bitwise_the_same_through_training(device):
    encoders = {name: tiny_encoders.build(f).bfloat16() for name, f in PAIRS["three"].items()}
    model = U2A(encoders, num_labels=5).to(device)
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(3):
        inputs = parity.batch(PAIRS["three"], 4, step, dtype=torch.float32)
        on(device, model)(**inputs, labels=torch.arange(4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before and all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
