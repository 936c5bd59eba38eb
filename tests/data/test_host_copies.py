"""Batches that hold masks and labels twice: Trainer brings the arrays to the model as they are."""

import functools

import numpy as np
import parity
import pytest
import tiny_encoders
import torch
import transformers

from u2a_fast import U2A, LoraConfig
from u2a_fast.data import HostCopies

FAMILIES = {"image": "vit", "text": "bert"}


def collate(seeds):
    batch = {**parity.batch(FAMILIES, len(seeds), seeds[0], dtype=torch.float32), "labels": torch.tensor(seeds) % 3}
    return {**batch, "modality_mask": parity.random_presence(len(seeds), 2, seeds[0])}


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([0.5, 2.0])], ids=["classes", "numbers"])
def test_whole_numbers_and_labels_are_shared_and_pixels_left_out(labels):
    batch = {**collate([0, 1]), "labels": labels}
    arrays = HostCopies(lambda samples: batch)([0, 1])["on_host"]
    assert arrays.keys() == {"image", "text", "labels", "modality_mask"} and arrays["image"] == {}
    assert arrays["text"].keys() == batch["text"].keys()
    assert np.shares_memory(arrays["labels"], labels.numpy())


def test_trainer_brings_the_arrays_to_the_model(tmp_path, monkeypatch):
    model = U2A({n: tiny_encoders.build(f) for n, f in FAMILIES.items()}, num_labels=3, lora=LoraConfig(r=2))
    seen, forward = [], U2A.forward

    @functools.wraps(forward)
    def noted(self, *args, on_host=None, **given):
        seen.append(on_host)
        return forward(self, *args, on_host=on_host, **given)

    monkeypatch.setattr(U2A, "forward", noted)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, use_cpu=True,
        report_to="none", eval_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=list(range(8)), eval_dataset=list(range(4)), data_collator=HostCopies(collate)
    )
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert len(seen) == 3 and all(isinstance(arrays["modality_mask"], np.ndarray) for arrays in seen)
