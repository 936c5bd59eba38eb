"""Whole models, loss and every gradient: Triton and ATen against the reference backend in fp64 on the CPU.

The error (of all gradients together, relative) is at most three times that of the reference backend in the same
precision on the same device. Two encoders of two layers, width 128; bf16, autocast, fp16 with a GradScaler, TF32, a
batch without pictures, a captured step, torch.compile, and a second device where there is one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import set_backend
from ..methods import PMF, JointEmbedding
from .correctness import tf32
from .models import Inputs, even_lengths, make_batch, on_device, ours, presence_table, vit_and_bert
from .report import Entry, NoResult, Report

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
SIDE, BATCH, LONGEST, CLASSES = 32, 8, 12, 8
FACTOR, SUMS = 3, 1e-5  # times plain low precision; what the order of fp32 sums may change
CPU = torch.device("cpu")
Found = dict[str, Tensor]  # "loss", and the gradient of every parameter that trains, in fp64 on the CPU
Run = Callable[[nn.Module, Inputs], Found]


def measure(report: Report) -> None:
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    device = report.device
    report.measure("U2A", compare, report, u2a(bf16), batch_of(bf16))
    report.measure('U2A, absent="where"', compare, report, u2a(bf16, absent="where"), batch_of(bf16))
    report.measure("PMF", compare, report, other(PMF, bf16), batch_of(bf16))
    report.measure("JointEmbedding", compare, report, other(JointEmbedding, bf16), batch_of(bf16))
    autocast, scaled = with_autocast(device, bf16), with_scaler(device, fp16)
    report.measure("U2A, autocast", compare, report, u2a(fp32), batch_of(fp32), autocast)
    report.measure("U2A, fp16, GradScaler", compare, report, u2a(fp32), batch_of(fp32), scaled)
    report.measure("U2A, tf32", compare, report, u2a(fp32), batch_of(fp32), with_tf32)
    report.measure("U2A, no pictures", compare, report, u2a(bf16), without_pictures(batch_of(bf16)))
    report.measure("U2A, second device", on_second_device, report)
    report.measure("U2A, graph", prepared, report, "graph", "pack")
    report.measure("U2A, compiled", prepared, report, "compiled", "where")


# ------------------------------------------------------------------------------------------------- models and batches
def u2a(dtype: torch.dtype, **options: Any) -> nn.Module:
    return with_random_adapters(ours(vit_and_bert(CPU, dtype, SIDE, **SIZES), **options))


def other(method: Callable[..., nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return with_random_adapters(method(vit_and_bert(CPU, dtype, SIDE, **SIZES), CLASSES).train())


def with_random_adapters(model: nn.Module) -> nn.Module:
    """B of an adapter starts at zero, and would hide A."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.05)
    return model


def batch_of(dtype: torch.dtype) -> Inputs:
    return make_batch(even_lengths(BATCH, 2, LONGEST), presence_table(BATCH, 0.7), CPU, dtype, SIDE)


def without_pictures(batch: Inputs) -> Inputs:
    batch = {name: value for name, value in batch.items() if name != "image"}
    return batch | {"modality_mask": torch.tensor([[False, True]]).expand(BATCH, 2).clone()}


# ------------------------------------------------------------------------------------------------------- running them
def plainly(model: nn.Module, batch: Inputs) -> Found:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return found(model, loss)


def found(model: nn.Module, loss: Tensor) -> Found:
    grads = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double().cpu()} | grads


def with_autocast(device: torch.device, dtype: torch.dtype) -> Run:
    def run(model: nn.Module, batch: Inputs) -> Found:
        with torch.autocast(device.type, dtype):
            return plainly(model, batch)

    return run


def with_scaler(device: torch.device, dtype: torch.dtype) -> Run:
    """Gradients as the optimizer sees them, after a step that the scaler let through."""

    def run(model: nn.Module, batch: Inputs) -> Found:
        model = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        with torch.autocast(device.type, dtype):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        got = found(model, loss)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < 1024:
            raise RuntimeError("the scaler skipped the step: a gradient was not finite")
        return got

    return run


def with_tf32(model: nn.Module, batch: Inputs) -> Found:
    with tf32(True):
        return plainly(model, batch)


# -------------------------------------------------------------------------------------------------------- comparisons
def under(backend: str, run: Run, model: nn.Module, batch: Inputs) -> Found:
    set_backend(backend)
    try:
        return run(model, batch)
    finally:
        set_backend("auto")


def exactly(model: nn.Module, batch: Inputs) -> Found:
    with contextlib.suppress(KeyError):
        pixels = batch["image"]["pixel_values"].double()
        batch = batch | {"image": {"pixel_values": pixels}}
    return under("reference", plainly, copy.deepcopy(model).double(), batch)


def compare(report: Report, model: nn.Module, batch: Inputs, run: Run = plainly) -> Entry:
    backends = ("torch",) if report.dry else ("triton", "torch")
    on_it, there = copy.deepcopy(model).to(report.device), on_device(batch, report.device)
    plain = under("reference", run, on_it, there)
    return verdict(exactly(model, batch), plain, {b: under(b, run, on_it, there) for b in backends})


def verdict(exact: Found, plain: Found, got: dict[str, Found]) -> Entry:
    wrong, errors = [], {"reference": error(plain, exact)}
    for backend, one in got.items():
        errors[backend] = error(one, exact)
        if one.keys() != exact.keys():
            wrong.append(f"{backend}: gradients of {sorted(one.keys() ^ exact.keys())[:3]} are there in one only")
        if not errors[backend] <= FACTOR * errors["reference"] + SUMS:
            wrong.append(f"{backend}: error {errors[backend]:.2e}, over {FACTOR} times {errors['reference']:.2e}")
    return {"wrong": wrong, "errors": {name: float(f"{value:.3g}") for name, value in errors.items()}}


def error(got: Found, exact: Found) -> float:
    """The larger of the relative errors of the loss and of all gradients as one vector."""
    shared = [n for n in exact if n in got and n != "loss"]
    off = sum((got[n] - exact[n]).square().sum() for n in shared)
    size = sum(exact[n].square().sum() for n in shared)
    of_loss = ((got["loss"] - exact["loss"]) / exact["loss"]).abs()
    return float(torch.maximum(torch.as_tensor(off / size).sqrt(), of_loss))


def on_second_device(report: Report) -> Entry:
    if report.dry or torch.cuda.device_count() < 2:
        raise NoResult("there is no second device")
    model, batch = u2a(torch.bfloat16), batch_of(torch.bfloat16)
    second = torch.device("cuda", 1)
    on_it, there = copy.deepcopy(model).to(second), on_device(batch, second)
    plain = under("reference", plainly, on_it, there)
    return verdict(exactly(model, batch), plain, {b: under(b, plainly, on_it, there) for b in ("triton", "torch")})


def prepared(report: Report, name: str, absent: str) -> Entry:
    """The compiled model, or its captured step, beside the eager one."""
    if report.dry:
        raise NoResult("nothing is captured or compiled in a dry run")
    model, batch = u2a(torch.bfloat16, absent=absent), batch_of(torch.bfloat16)
    on_it, there = copy.deepcopy(model).to(report.device), on_device(batch, report.device)
    plain = under("reference", plainly, on_it, there)
    if name == "graph":
        on_it.capture()
    else:
        torch._dynamo.reset()
        on_it.compile()
    return verdict(exactly(model, batch), plain, {name: under("triton", plainly, on_it, there)})
