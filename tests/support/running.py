"""Where an op runs: by which implementation, on which device; the test around it stays on the CPU.

with running("triton", device) as launched:          # on a CPU Triton kernels run in the interpreter
    y = on(device, kernels.lora_linear)(**given)     # given, y and every gradient are the CPU's
assert "linear_lowrank_forward" in launched
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map
from triton_interpreter import interpreted

from u2a_fast.kernels import backend

CPU = torch.device("cpu")


@contextlib.contextmanager
def running(implementation, device, sanitizers=("bounds",), seed=0):
    """Ops run as "reference", "torch" or "triton"; yields the list of the names of the kernels launched.

    `sanitizers` and `seed` are those of the interpreter, for Triton on a CPU.
    """
    if implementation == "triton" and device.type == "cpu":
        with interpreted(sanitizers, seed) as launched:
            yield launched
        return
    launched, launch, before = [], backend.launch, backend.get_backend()

    def noted(kernel, grid, **arguments):
        if 0 not in grid:
            launched.append(kernel.__name__)
        launch(kernel, grid, **arguments)

    backend.set_backend(implementation)
    try:
        with mock.patch.object(backend, "launch", noted):
            yield launched
    finally:
        backend.set_backend(before)


def skip_wide_tiles(implementation, device):
    """fp64 tiles fit no GPU: there `auto` takes ATen."""
    if implementation == "triton" and device.type == "cuda":
        pytest.skip("fp64 tiles fit no GPU: auto takes ATen")


def on(device, function):
    """`function` on `device`: its tensors are copied there, strides included, and its results back; differentiable."""
    if device == CPU:
        return function

    def moving(*args, **kwargs):
        args, kwargs = moved((args, kwargs), device)
        return moved(function(*args, **kwargs), CPU)

    return moving


def moved(tree, device):
    """The tree with every tensor on `device`: on the same one the tensor itself, else a copy that gradients pass."""
    return tree_map(lambda t: _Moved.apply(t, device) if torch.is_tensor(t) and t.device != device else t, tree)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, device):
        ctx.device = t.device
        return _copied(t, device)

    @staticmethod
    def backward(ctx, grad):
        return _copied(grad, ctx.device), None


def _copied(t, device):
    """A copy with the strides and the offset of t; `.to` would close gaps and write out what is expanded."""
    if t.numel() == 0:
        return t.to(device)
    place = t.storage_offset()
    end = place + 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((end,), (1,), 0).to(device).as_strided(t.shape, t.stride(), place)
