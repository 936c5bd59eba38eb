"""Training in little memory: checkpointing, lean activations, 8-bit optimizers, and the example of large encoders."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import tiny_encoders
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN

from u2a_fast import U2A, LoraConfig, memory
from u2a_fast.activations import LEAN_ACTIVATIONS
from u2a_fast.cli import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "low_memory.py"
LARGE = "qwen3-embedding-8b+dinov3-7b"


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("quantization", [None, "int8", "int8_w8a8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_number(dtype, quantization, dropout):
    pair = {"image": "dinov2", "text": "bert"}
    encoders = {name: tiny_encoders.build(family).to(dtype) for name, family in pair.items()}
    lora = LoraConfig(r=2, lora_dropout=dropout)
    model = U2A(encoders, num_labels=3, lora=lora, quantization=quantization).train()
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.1)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        present = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
        out = model(**parity.batch(pair, 4, dtype=torch.float32), modality_mask=present, labels=torch.arange(4) % 3)
        out.loss.backward()
        results.append((out.loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (again, recomputed) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())
    model.activation_checkpointing_disable()


@pytest.mark.parametrize("name", LEAN_ACTIVATIONS)
def test_lean_activations_are_hugging_faces_and_keep_one_tensor(name):
    x = torch.randn(999, requires_grad=True)
    plain, lean = (torch.autograd.grad(f(x).sum(), x)[0] for f in (ACT2FN[name], LEAN_ACTIVATIONS[name]))
    assert torch.allclose(LEAN_ACTIVATIONS[name](x), ACT2FN[name](x), atol=1e-6)
    assert torch.allclose(plain, lean, atol=1e-6)
    assert memory.saved_bytes(lambda: LEAN_ACTIVATIONS[name](x)) == 4 * 999


@pytest.mark.slow
def test_an_8_bit_optimizer_trains_through_trainer(tmp_path):
    pytest.importorskip("bitsandbytes")
    pair = {"image": "vit", "text": "bert"}
    encoders = {name: tiny_encoders.build(family) for name, family in pair.items()}
    model = U2A(encoders, num_labels=3, lora=LoraConfig(r=2), quantization="int8")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [
        {**parity.batch(pair, 1, seed, dtype=torch.float32), "labels": torch.tensor([seed % 3])} for seed in range(8)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path), optim="adamw_bnb_8bit", max_steps=3, remove_unused_columns=False, use_cpu=True, report_to="none"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=join)
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_a" in name for name in moved)
    assert all(dict(model.named_parameters())[name].requires_grad for name in moved)


def join(samples):
    first = samples[0]
    inputs = {m: {k: torch.cat([s[m][k] for s in samples]) for k in first[m]} for m in first if m != "labels"}
    return {**inputs, "labels": torch.cat([s["labels"] for s in samples])}


@pytest.mark.slow
def test_encoders_larger_than_the_memory_train_within_4_gib():
    """ViT-H and a BERT of 1.0e9 parameters: the fp32 weights alone would not fit."""
    command = [sys.executable, str(EXAMPLE), "--steps", "1", "--batch", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    needed = float(re.search(r"fp32 weights would take ([\d.]+) GiB", run.stdout)[1])
    peak = float(re.search(r"peak memory of the process: ([\d.]+) GiB", run.stdout)[1])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert needed > 6
    assert peak < 4
    assert len(losses) == 1 and 0 < losses[0] < 50


@pytest.mark.slow
def test_the_largest_preset_trains_a_layer_of_each(capsys):
    example = runpy.run_path(str(EXAMPLE))
    preset = example["PRESETS"][LARGE]
    preset.image.num_hidden_layers = preset.text.num_hidden_layers = 1
    preset.image.intermediate_size = preset.text.intermediate_size = 1024  # or most of the time goes to drawing
    preset.text.vocab_size = 999
    example["train"](preset, preset.quantization, steps=1, size=1)
    printed = capsys.readouterr().out
    weights = 4096 * (128 * (32 + 8 + 8 + 32) + 3 * 1024) + 4096 * (4 * 4096 + 3 * 1024)
    weights += 4096 * (999 + 3 * 16 * 16)  # words and patches
    count = int(re.search(r"all params: ([\d,]+)", printed)[1].replace(",", ""))
    assert weights < count < 1.05 * weights
    assert 0 < float(re.search(r"loss ([\d.]+)", printed)[1]) < 50


@pytest.mark.slow
def test_two_of_the_largest_encoders_are_planned_and_fit_a_common_gpu(tmp_path, capsys):
    """The figures of docs/memory.md: `u2a-fast memory` reads the example's configs from folders."""
    preset = runpy.run_path(str(EXAMPLE))["PRESETS"][LARGE]
    folders = {name: str(tmp_path / name) for name in ("image", "text")}
    for name, folder in folders.items():
        getattr(preset, name).save_pretrained(folder)
    main(["memory", "--encoders", json.dumps(folders), "--quantization", "nf4", "--checkpointing"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "U2A, nf4 8.39 0.07 0.14" in printed and "11.70 0.05" in printed
    assert (
        "computed, for GPUs of 24, 48 and 80 GB: U2A, nf4 fits from 24 GB on; PEFT LoRA, bf16 autocast fits from 80 GB "
        "on; full fine-tuning, fp32 fits none of them"
    ) in printed
