"""A captured step is the eager one: the same numbers from one replay, whatever the batch holds.

There is no GPU here, so `record` repeats operations on the same tensors (tests/support/recorded.py).
"""

import copy

import device
import parity
import pytest
import recorded
import tiny_encoders
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BatchEncoding

from u2a_fast import PMF, U2A, LoraConfig, capture
from u2a_fast.capture import Steps

FAMILIES = {
    "pre and post norm": {"image": "vit", "text": "bert"},
    "layer scale and causal": {"image": "dinov2", "text": "clip_text"},
    "three": {"image": "deit", "text": "roberta", "audio": "whisper"},
}
COUNT, CLASSES = 16, 4


@pytest.fixture
def replays(monkeypatch):
    """How often a graph was replayed: one entry each time."""
    launched = []

    def record(run, pool):
        replay, result, pool = recorded.record(run, pool)
        return lambda: launched.append(replay()), result, pool

    monkeypatch.setattr(capture, "record", record)
    return launched


class Names(TorchDispatchMode):
    """The operations that run inside."""

    def __enter__(self):
        super().__enter__()
        self.names = []
        return self.names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


def models(families, **options):
    """The same model twice; the second captures."""
    built = {name: tiny_encoders.build(family, seed=i) for i, (name, family) in enumerate(families.items())}
    lora = LoraConfig(r=2, lora_alpha=4)
    eager = U2A(built, CLASSES, lora=lora, translate_all=True, **options).double().train()
    for name, parameter in eager.named_parameters():
        if "lora_b" in name or "translators" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    captured = copy.deepcopy(eager)
    captured._steps = Steps(captured, captured._adapters_ahead)
    return eager, captured


def batch(families, seed, present=None):
    if present is None:
        present = parity.random_presence(COUNT, len(families), seed)
    labels = torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(seed))
    return {**parity.batch(families, COUNT, seed), "modality_mask": present, "labels": labels}


def step(model, given, seed=0):
    """Losses, logits and every gradient."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**given)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits, "align": out.align_loss, **grads}


def assert_equal(got, expected, limit=0.0):
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        torch.testing.assert_close(got[name], exact, rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES)
def test_replays_of_fixed_shapes_equal_eager_bit_for_bit(families, separate_heads, replays):
    eager, captured = models(families, absent="where", modality_dropout=0.5, separate_heads=separate_heads)
    step(captured, batch(families, 0))
    for seed in range(1, 4):
        before, given = len(replays), batch(families, seed)
        assert_equal(step(captured, given, seed), step(eager, given, seed))
        assert len(replays) == before + 1
    assert len(captured._steps.steps) == 1


@pytest.mark.slow
def test_adapters_in_fp32_are_cast_once_a_step_for_encoders_in_bf16(replays):
    families = FAMILIES["pre and post norm"]
    eager, captured = models(families, absent="where", modality_dropout=0.0)
    for model in (eager, captured):
        model.float()
        for p in (p for p in model.encoders.parameters() if not p.requires_grad):
            p.data = p.data.bfloat16()
    given = batch(families, 0)
    given["image"]["pixel_values"] = given["image"]["pixel_values"].bfloat16()
    ahead = captured._adapters_ahead()
    adapters = [p for n, p in captured.encoders.named_parameters() if "lora_" in n]
    assert len(ahead) == len(adapters) and {dtype for _, dtype in ahead} == {torch.bfloat16}
    assert_equal(step(captured, given), step(eager, given))  # captured
    for p in adapters:  # as an optimizer changes them
        p.data.mul_(1.5)
    for name, p in eager.encoders.named_parameters():
        p.data.mul_(1.5 if "lora_" in name else 1)
    assert_equal(step(captured, given), step(eager, given))  # replayed


@pytest.mark.slow
@pytest.mark.parametrize("separate_heads", [False, True])
@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES)
def test_packed_samples_of_a_few_sizes_give_what_eager_gives(families, separate_heads, replays):
    eager, captured = models(families, modality_dropout=0.0, separate_heads=separate_heads)
    for seed in range(6):
        given = batch(families, seed)
        assert_equal(step(captured, given), step(eager, given), limit=1e-9)
    assert len(replays) == 6


def test_a_modality_that_nobody_has_gets_no_gradient(replays):
    families = FAMILIES["pre and post norm"]
    eager, captured = models(families, modality_dropout=0.0)
    given = batch(families, 0, torch.tensor([[False, True]]).expand(COUNT, 2).clone())
    got, expected = step(captured, given), step(eager, given)
    rooms = ("encoders.image", "mask_tokens.image", "translators.image")
    of_images = [name for name in expected if name.startswith(rooms)]
    assert all(not expected.pop(name).any() for name in of_images)  # packed rows of nobody: zeros
    assert_equal(got, expected, limit=1e-9)


@pytest.mark.slow
def test_the_same_packed_step_is_bitwise_the_one_that_was_captured(replays):
    families = FAMILIES["pre and post norm"]
    _, captured = models(families, modality_dropout=0.0)
    given = [batch(families, seed, torch.ones(COUNT, 2, dtype=torch.bool)) for seed in (0, 1)]
    first = step(captured, given[0])
    step(captured, given[1])
    assert_equal(step(captured, given[0]), first)


@pytest.mark.slow
def test_what_a_processor_gives_is_a_batch(replays):
    """Its result is a mapping of its own, whose values count and not what it prints."""
    families = FAMILIES["pre and post norm"]
    eager, captured = models(families, absent="where", modality_dropout=0.0)
    for seed in range(3):
        given = batch(families, seed)
        own = {**given, **{name: BatchEncoding(given[name]) for name in families}}
        assert_equal(step(captured, own), step(eager, given))
    assert len(captured._steps.steps) == 1


@pytest.mark.slow
def test_gradients_accumulate(replays):
    families = FAMILIES["pre and post norm"]
    eager, captured = models(families, absent="where", modality_dropout=0.0)
    for model in (eager, captured):
        for seed in range(3):
            (model(**batch(families, seed)).loss / 3).backward()
    for (name, p), own in zip(eager.named_parameters(), captured.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(own.grad, p.grad, rtol=1e-12, atol=1e-15, msg=name)


def test_a_replay_touches_nothing_but_its_inputs_and_results(replays):
    """Besides the replay: a copy for each input, a clone for each result, and one product of all gradients."""
    families = FAMILIES["pre and post norm"]
    _, captured = models(families, absent="where", modality_dropout=0.5)
    step(captured, batch(families, 0))
    (own,) = captured._steps.steps.values()
    own.replay = lambda: replays.append("launch")
    replays.clear()
    captured.zero_grad()
    with Names() as names:
        own(own.tensors)[0].backward()
    names = [name for name in names if name not in ("detach", "ones_like")]  # views, and what backward starts from
    assert replays == ["launch"]
    assert names == ["copy_"] * len(own.tensors) + ["clone"] * 4 + ["_foreach_mul"]


@pytest.mark.parametrize("absent", ["where", "pack"])
def test_a_step_of_fixed_shapes_waits_for_nothing(absent, monkeypatch):
    families = FAMILIES["pre and post norm"]
    eager, _ = models(families, absent=absent)
    given = batch(families, 0)
    inputs = {name: given[name] for name in families}
    fixed = eager.fixed(inputs, given["modality_mask"], {"text": given["text"]["attention_mask"].bool()})
    stand_in = device.StandIn(monkeypatch)
    tensors = [leaf for leaf in tree_leaves(fixed) if torch.is_tensor(leaf)]
    stand_in.put(*eager.parameters(), *eager.buffers(), *tensors, given["labels"])
    with stand_in:
        eager.losses(*eager.encode_fixed(fixed), given["labels"])[0].backward()
    assert stand_in.waits == [] and stand_in.copies == 0


def test_gradients_of_a_step_that_was_overwritten_are_refused(replays):
    families = FAMILIES["pre and post norm"]
    _, captured = models(families, absent="where")
    loss = captured(**batch(families, 0)).loss
    captured(**batch(families, 1))
    with pytest.raises(RuntimeError, match="before the next forward"):
        loss.backward()


def test_what_moves_parameters_drops_the_graphs(replays):
    families = FAMILIES["pre and post norm"]
    _, captured = models(families, absent="where")
    step(captured, batch(families, 0))
    captured.double()
    assert not captured._steps.steps


def test_more_shapes_than_graphs_run_eagerly(replays, monkeypatch):
    families = FAMILIES["pre and post norm"]
    eager, captured = models(families, absent="where", modality_dropout=0.0)
    monkeypatch.setattr(capture, "MOST_GRAPHS", 0)
    with pytest.warns(UserWarning, match="0 shapes of batches"):
        got = step(captured, batch(families, 0))
    assert_equal(got, step(eager, batch(families, 0)))
    assert not replays


def test_evaluation_and_steps_without_labels_are_not_captured(replays):
    families = FAMILIES["pre and post norm"]
    _, captured = models(families, absent="where")
    given = batch(families, 0)
    captured(**{name: value for name, value in given.items() if name != "labels"})
    with torch.no_grad():
        captured(**given)
    assert not captured._steps.steps


def test_processes_that_train_together_capture_nothing(replays):
    eager, captured = models(FAMILIES["pre and post norm"], absent="where")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="leave capture"):
            eager.capture()
        with pytest.raises(ValueError, match="leave capture"):
            captured(**batch(FAMILIES["pre and post norm"], 0))
    finally:
        distributed.destroy_process_group()
    assert eager._steps is None and not captured._steps.steps and not replays


def test_what_cannot_be_captured_says_so():
    families = FAMILIES["pre and post norm"]
    built = {name: tiny_encoders.build(family) for name, family in families.items()}
    with pytest.raises(ValueError, match="not on cpu"):
        U2A(built, CLASSES).capture()
    with pytest.raises(ValueError, match="PMF"):
        PMF(built, CLASSES, fusion_layers=1).capture()
