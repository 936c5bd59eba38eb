"""A training step waits for the device once at most, however many modalities there are; with static shapes never."""

import device
import parity
import pytest
import tiny_encoders
import torch
from torch.utils._pytree import tree_map

from u2a_fast import PMF, U2A, JointEmbedding, LateFusion, host
from u2a_fast.data import HostCopies

FAMILIES = {
    "pre and post norm": {"image": "vit", "text": "bert"},
    "layer scale and causal": {"image": "dinov2", "text": "clip_text"},
    "mean-pooled": {"audio": "wav2vec2", "image": "siglip_vision"},
    "three": {"image": "deit", "text": "roberta", "audio": "whisper"},
}
METHODS = {
    "u2a": (U2A, {"modality_dropout": 0.5}, 1),
    "u2a, static shapes": (U2A, {"modality_dropout": 0.5, "absent": "where"}, 0),
    "pmf": (PMF, {"fusion_layers": 1}, 1),
    "joint_embedding": (JointEmbedding, {}, 1),
    "late_fusion": (LateFusion, {}, 1),
}
COUNT, LABELS = 6, torch.arange(6) % 4


def on_stand_in(monkeypatch, model, batch):
    """A device that holds the model and the batch."""
    stand_in = device.StandIn(monkeypatch)
    tensors = [t for inputs in batch.values() for t in (inputs.values() if isinstance(inputs, dict) else [inputs])]
    stand_in.put(*model.parameters(), *model.buffers(), *tensors)
    return stand_in


@pytest.mark.slow
@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("method, options, copies", METHODS.values(), ids=METHODS)
def test_a_step_waits_once_at_most(method, options, copies, families, monkeypatch):
    model = method({m: tiny_encoders.build(f) for m, f in families.items()}, num_labels=4, **options).train()
    batch = {**parity.batch(families, COUNT, dtype=torch.float32), "labels": LABELS.clone()}
    batch["modality_mask"] = parity.random_presence(COUNT, len(families), 0)
    with on_stand_in(monkeypatch, model, batch) as stand_in:
        model(**batch).loss.backward()
    assert stand_in.waits == [] and stand_in.copies == copies


@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("method, options", [case[:2] for case in METHODS.values()], ids=METHODS)
def test_copies_on_the_host_spare_a_step_its_wait_and_change_nothing(method, options, families, monkeypatch):
    options = options | ({"modality_dropout": 0.0} if "modality_dropout" in options else {})
    model = method({m: tiny_encoders.build(f) for m, f in families.items()}, num_labels=4, **options).train()
    batch = {**parity.batch(families, COUNT, dtype=torch.float32), "labels": LABELS.clone()}
    batch["modality_mask"] = parity.random_presence(COUNT, len(families), 0)
    expected = model(**batch).loss
    batch = HostCopies(lambda batch: batch)(batch)
    arrays, batch = batch.pop("on_host"), tree_map(torch.clone, {k: v for k, v in batch.items() if k != "on_host"})
    with on_stand_in(monkeypatch, model, batch) as stand_in:
        loss = model(**batch, on_host=arrays).loss
        loss.backward()
    assert stand_in.waits == [] and stand_in.copies == 0
    assert torch.equal(loss, expected)


def test_values_are_checked_on_the_host_where_static_shapes_wait_for_nothing():
    families = FAMILIES["pre and post norm"]
    model = U2A({m: tiny_encoders.build(f) for m, f in families.items()}, num_labels=4, absent="where").train()
    batch = {**parity.batch(families, COUNT, dtype=torch.float32), "labels": LABELS.clone()}
    batch["modality_mask"] = torch.zeros(COUNT, 2, dtype=torch.bool)
    arrays = HostCopies(lambda batch: batch)(batch)["on_host"]
    with pytest.raises(ValueError, match="every modality absent"):
        model(**batch, on_host=arrays)


@pytest.mark.parametrize("padded", [slice(0, 2), slice(2, 3), slice(0)], ids=["left", "hole", "none"])
@pytest.mark.parametrize("method, options, copies", METHODS.values(), ids=METHODS)
def test_no_padding_is_worked_out_twice(method, options, copies, padded, monkeypatch):
    families = FAMILIES["pre and post norm"]
    model = method({m: tiny_encoders.build(f) for m, f in families.items()}, num_labels=4, **options).train()
    batch = {**parity.batch(families, COUNT, padded=False, dtype=torch.float32), "labels": LABELS.clone()}
    batch["text"]["attention_mask"][1, padded] = 0
    with on_stand_in(monkeypatch, model, batch) as stand_in:
        model(**batch).loss.backward()
    assert stand_in.waits == [] and stand_in.copies == copies


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": LABELS + 1}, "label 4 is out of range"),
        ({"modality_mask": LABELS[:, None] > 0}, r"samples \[0, 4\]"),
    ],
)
def test_values_on_a_device_are_checked_too(change, message, monkeypatch):
    families = FAMILIES["pre and post norm"]
    model = U2A({m: tiny_encoders.build(f) for m, f in families.items()}, num_labels=4)
    batch = {**parity.batch(families, COUNT, dtype=torch.float32), **change}
    if "modality_mask" in batch:
        batch["modality_mask"] = batch["modality_mask"].expand(-1, 2).clone()
    with on_stand_in(monkeypatch, model, batch) as stand_in, pytest.raises(ValueError, match=message):
        model(**batch)
    assert stand_in.copies == 1


@pytest.mark.parametrize("method, options, copies", METHODS.values(), ids=METHODS)
def test_a_device_changes_no_number(method, options, copies, monkeypatch):
    """What is worked out on the host for a device is what is worked out on the CPU."""
    families = FAMILIES["three"]
    model = method({m: tiny_encoders.build(f) for m, f in families.items()}, num_labels=4, **options).eval()
    batch = parity.batch(families, COUNT, dtype=torch.float32)
    present = parity.random_presence(COUNT, 3, 1)
    expected = model(**batch, modality_mask=present).logits
    with on_stand_in(monkeypatch, model, {**batch, "modality_mask": present}):
        got = model(**batch, modality_mask=present).logits
    assert torch.equal(got, expected)


def test_one_copy_carries_any_dtypes():
    given = [
        torch.rand(3) > 0.5,
        torch.arange(5),
        torch.rand(2, 3).double(),
        torch.zeros(0, 4).half(),
        torch.rand(4, 2).t(),
    ]
    copies = host.in_one_copy(given)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(copies, given, strict=True))
    assert host.to_host(None, given[0], [1]) == [None, given[0], [1]]


def test_the_stand_in_notices_every_kind_of_read(monkeypatch):
    stand_in, x, elsewhere = device.StandIn(monkeypatch), torch.arange(4.0), torch.arange(4.0)
    stand_in.put(x)
    reads = {
        "_local_scalar_dense": lambda t: bool((t + 1).any()),
        "nonzero": lambda t: t[1:].nonzero(),
        "index": lambda t: t[t > 1],
        "tolist": lambda t: (2 * t).tolist(),
        "cpu": lambda t: t.view(2, 2).cpu(),
        "equal": lambda t: torch.equal(t, t),
    }
    with stand_in:
        for read in reads.values():
            read(x)
            read(elsewhere)
    assert stand_in.waits == list(reads)
