"""What a sample is told depends on that sample alone, whatever lies beside it: any method, any batch, any presence."""

import functools

import parity
import pytest
import tiny_encoders
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, LoraConfig

FAMILIES = {"text": "bert", "image": "vit", "audio": "whisper"}
METHODS = {
    "u2a": (U2A, {}),
    "u2a of static shapes": (U2A, {"absent": "where"}),
    "pmf": (PMF, {}),
    "joint embedding": (JointEmbedding, {}),
    "late fusion": (LateFusion, {}),
}


@functools.cache
def model(name):
    method, options = METHODS[name]
    torch.manual_seed(0)
    built = method(tiny_encoders.build_many(FAMILIES), num_labels=4, **options).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return built


@st.composite
def batches(draw, fewest=1):
    """Inputs of 1 to 5 samples, and who has what; no sample has nothing."""
    rows = st.lists(st.booleans(), min_size=len(FAMILIES), max_size=len(FAMILIES)).filter(any)
    present = torch.tensor(draw(st.lists(rows, min_size=fewest, max_size=5)))
    return parity.batch(FAMILIES, len(present), draw(st.integers(0, 99))), present


def chosen(inputs, rows):
    return {name: {key: value[rows] for key, value in values.items()} for name, values in inputs.items()}


def logits(name, inputs, present):
    with torch.no_grad():
        return model(name)(**inputs, modality_mask=present).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_permuting_rows_permutes_answers(name, batch, seed):
    inputs, present = batch
    order = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))
    moved = logits(name, chosen(inputs, order), present[order])
    parity.assert_close(moved, logits(name, inputs, present)[order], 1e-12, "permuted")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15, deadline=None)
@given(batch=batches(fewest=2), kept=st.integers(1, 4))
def test_rows_that_are_added_change_no_other(name, batch, kept):
    """Also where the rows that are there have no modality of those that are added, and the other way round."""
    inputs, present = batch
    rows = slice(0, min(kept, len(present) - 1))
    alone = logits(name, chosen(inputs, rows), present[rows])
    parity.assert_close(alone, logits(name, inputs, present)[rows], 1e-12, "beside others")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15, deadline=None)
@given(batch=batches(), junk=st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_a_keyword_that_is_left_out_is_a_modality_that_nobody_has(name, batch, junk):
    inputs, present = batch
    present[:, 2] = False
    present[:, 0] |= ~present.any(dim=1)
    without = logits(name, {key: inputs[key] for key in ("text", "image")}, present)
    inputs["audio"] = {key: torch.full_like(value, junk) for key, value in inputs["audio"].items()}
    parity.assert_close(logits(name, inputs, present), without, 1e-12, "with junk")


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_of_ones_is_no_mask(name):
    inputs = parity.batch(FAMILIES, 4)
    everyone = torch.ones(4, len(FAMILIES), dtype=torch.bool)
    with torch.no_grad():
        plain = model(name)(**inputs).logits
    assert torch.equal(plain, logits(name, inputs, everyone))


@pytest.mark.parametrize("name", ["u2a", "u2a of static shapes"])
def test_where_everything_is_present_it_is_the_model_without_stand_ins(name):
    """Head and sum of class tokens: what stands in for a modality is computed, and not used."""
    fast, inputs, everyone = model(name), parity.batch(FAMILIES, 4), torch.ones(4, 3, dtype=torch.bool)
    with torch.no_grad():
        encoded = fast.encode(inputs, everyone)
        expected = F.linear(encoded.class_tokens.sum(dim=0), fast.head.weight, fast.head.bias)
        parity.assert_close(logits(name, inputs, everyone), expected, 1e-12, "logits")
        junk = type(encoded)(encoded.class_tokens, torch.randn_like(encoded.proxies))
        assert torch.equal(fast.fuse(junk, everyone)[0], fast.fuse(encoded, everyone)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("absent", ["pack", "where"])
def test_checkpointing_changes_neither_loss_nor_gradients(absent, dropout):
    """The gradients are the same bits: the same sums of the same numbers, computed twice."""
    built = tiny_encoders.build_many(FAMILIES)
    fast = U2A(built, num_labels=4, lora=LoraConfig(r=2, lora_dropout=dropout), absent=absent).double().train()
    inputs, present = parity.batch(FAMILIES, 5), parity.random_presence(5, 3, 1)
    found = []
    for enable in (None, fast.activation_checkpointing_enable):
        if enable is not None:
            enable()
            assert fast.is_gradient_checkpointing
        fast.zero_grad()
        torch.manual_seed(1)
        out = fast(**inputs, modality_mask=present, labels=torch.arange(5) % 4)
        out.loss.backward()
        gradients = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
        found.append({"loss": out.loss.detach(), **gradients})
    plain, again = found
    assert plain.keys() == again.keys() and any("lora_a" in name for name in plain)
    for key, value in plain.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_fp16_under_a_scaler_trains(name):
    method, options = METHODS[name]
    fast = method(tiny_encoders.build_many(FAMILIES), num_labels=4, **options).train()
    trained = [p for p in fast.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer, scaler = torch.optim.SGD(trained, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs, present = parity.batch(FAMILIES, 5, dtype=torch.float32), parity.random_presence(5, 3, 1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = fast(**inputs, modality_mask=present, labels=torch.arange(5) % 4).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "a step was skipped"
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))


@pytest.mark.parametrize("method", [U2A, PMF, functools.partial(JointEmbedding, tuning=LoraConfig())])
@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_a_step_in_which_nobody_has_a_modality_is_one_without_it(family, method):
    """Whichever encoder it is: every row of its inputs is of somebody who has not got it."""
    families = {"own": family, "image": "vit"}
    fast = method(tiny_encoders.build_many(families), num_labels=4).double().eval()
    inputs, labels = parity.batch(families, 3), torch.arange(3)
    found = []
    for given_ in (inputs, {"image": inputs["image"]}):
        fast.zero_grad()
        out = fast(**given_, modality_mask=torch.tensor([[False, True]] * 3), labels=labels)
        out.loss.backward()
        found.append([out.loss.detach()] + [p.grad for name, p in fast.named_parameters() if name.startswith("head")])
    assert all(torch.equal(ran, left_out) for ran, left_out in zip(*found, strict=True))
