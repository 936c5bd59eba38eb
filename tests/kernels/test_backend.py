"""The switch: what is chosen for which tensors, and what it refuses."""

import doctest
import importlib
import os
import subprocess
import sys

import pytest
import torch

from u2a_fast import kernels
from u2a_fast.kernels import backend, targets

MODULES = ("backend", "dropout", "linear_backward", "linear_lowrank", "lora_linear", "quantize", "reduce", "tiling")


def python(code, **environment):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_the_chosen_name_is_remembered(name):
    backend.set_backend(name)
    assert kernels.get_backend() == name


def test_auto_is_torch_on_a_cpu():
    assert backend.resolve(torch.ones(1), None) == "torch"


def test_auto_is_triton_on_a_gpu_except_for_float64(monkeypatch):
    monkeypatch.setattr(targets, "architecture", lambda index: "sm_90")
    targets._gpu_supports.cache_clear()

    class OnGpu:
        device, dtype, is_cpu = torch.device("cuda:0"), torch.bfloat16, False

    class Double(OnGpu):
        dtype = torch.float64

    assert backend.resolve(OnGpu(), None) == "triton"
    assert backend.resolve(Double()) == "torch"
    backend.set_backend("torch")
    assert backend.resolve(OnGpu()) == "torch"
    targets._gpu_supports.cache_clear()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda': choose one of auto, reference, torch, triton"):
        backend.set_backend("cuda")


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(ValueError, match="pip install triton"):
        backend.set_backend("triton")


def test_triton_on_cpu_tensors_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.set_backend("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, None, None, 1.0)


def test_tensors_of_two_devices_are_refused_by_name():
    with pytest.raises(ValueError, match="one device, not on cpu and meta"):
        backend.resolve(torch.ones(1), None, torch.ones(1, device="meta"))


@pytest.mark.slow
def test_a_dtensor_is_refused():
    code = """
import torch, torch.distributed as dist
from torch.distributed.tensor import distribute_tensor, init_device_mesh, Replicate
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x = distribute_tensor(torch.ones(2, 3), init_device_mesh("cpu", (1,)), [Replicate()])
from u2a_fast.kernels import lora_linear
try:
    lora_linear(x, torch.ones(4, 3), None, None, None, 1.0)
except TypeError as error:
    print(error)
"""
    assert "DTensor inputs are not supported" in python(code)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_autocast_dtype_wins_except_over_float64(dtype):
    with torch.autocast("cpu", dtype):
        assert backend.in_autocast_dtype(torch.ones(1)).dtype == dtype
        assert backend.in_autocast_dtype(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert backend.in_autocast_dtype(torch.ones(1)).dtype == torch.float32


def test_second_derivatives_are_refused_but_by_the_reference():
    x, a, b = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for implementation in ("torch", "reference"):
        backend.set_backend(implementation)
        y = kernels.rms_norm(kernels.lora_linear(x, torch.eye(4, dtype=torch.float64), None, a, b, 1.0), a[0])
        if implementation == "torch":
            with pytest.raises(RuntimeError, match="no second derivatives: leave create_graph=True out"):
                torch.autograd.grad(y.sum(), x, create_graph=True)
        else:
            (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            assert torch.autograd.grad(grad.square().sum(), (x, a, b))[2].any()


def test_shapes_are_known_on_the_meta_device():
    x, weight, a, b = (
        torch.ones(shape, device="meta", requires_grad=True) for shape in ((2, 3), (4, 3), (1, 3), (4, 1))
    )
    y, rows = kernels.norm_linear(x[None], a[0], None, 1e-5, weight.detach(), None, a, b, 1.0)
    y.sum().backward()
    assert (y.shape, rows.shape, x.grad.shape, y.device.type) == ((1, 2, 4), (1, 2, 3), (2, 3), "meta")


def test_an_empty_grid_launches_nothing():
    backend.launch(None, (0, 3), X=torch.ones(1))


def test_a_launch_passes_grid_arguments_and_options_and_no_more_stages_than_amd_has_room_for(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: launched.append((grid, arguments))

    x = torch.ones(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.launch(Kernel(), (2,), P=None, X=x, M=5, BM=16, num_stages=3)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    backend.launch(Kernel(), (2,), P=None, X=x, M=5, BM=16, num_stages=3)
    given = {"P": None, "X": x, "M": 5, "BM": 16}
    assert launched == [((2,), given | {"num_stages": stages}) for stages in (3, 2)]


def test_recorded_launches_are_not_run_and_name_their_arguments():
    class Kernel:
        arg_names = ["X", "n", "BM"]

    x = torch.ones(1)
    with pytest.raises(ZeroDivisionError), backend.recording() as launches:
        backend.launch(Kernel, (2,), X=x, n=5, BM=16, num_stages=3)
        backend.launch(Kernel, (0,), X=x, n=5, BM=16, num_stages=3)
        1 / 0  # noqa: B018
    assert launches == [(Kernel, (2,), {"X": x, "n": 5, "BM": 16, "num_stages": 3})]
    assert backend._recorded is None


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(f"u2a_fast.kernels.{name}")).failed == 0


LINEAR = """
import torch
from u2a_fast import kernels
torch.manual_seed(0)
x, w, a = torch.randn(20, 40).to({dtype}), torch.randn(24, 40), torch.randn(6, 40, requires_grad=True)
b = torch.randn(24, 6, requires_grad=True)
results = []
for name in {names}:
    kernels.set_backend(name)
    y = kernels.lora_linear(x, w, None, a, b, 0.5)
    results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), (a, b))])
for one, other in zip(results[0], results[-1], strict=True):
    assert ((one - other).norm() / other.norm()) < {limit}, (one - other).norm() / other.norm()
print("the same")
"""


@pytest.mark.slow
def test_everything_works_where_triton_is_not_installed():
    code = "import sys; sys.modules['triton'] = None\n" + LINEAR
    assert python(code.format(dtype="torch.float32", names=("auto", "reference"), limit=1e-5)) == "the same\n"


@pytest.mark.slow
def test_tritons_own_interpreter_runs_bfloat16_kernels():
    code = LINEAR.format(dtype="torch.bfloat16", names=("triton", "torch"), limit=0.01)
    assert python(code, TRITON_INTERPRET="1") == "the same\n"


@pytest.mark.slow
def test_tritons_own_interpreter_writes_nothing_but_results():
    """Inputs that are views of each other, expanded or kept for backward would notice."""
    code = """
import torch
from u2a_fast import kernels
kernels.set_backend("triton")
q, k, v = torch.randn(3, 1, 2, 6, 8).bfloat16().requires_grad_(True).unbind()
kernels.attention(q.expand(2, -1, -1, -1), *(t.expand(2, -1, -1, -1) for t in (k, v)), read_only=2).sum().backward()
weight = torch.full((8, 8), float("nan")).bfloat16()
kernels.lora_linear(torch.ones(3, 8).bfloat16(), weight, None, None, None, 1.0)
print(weight._version)
"""
    assert python(code, TRITON_INTERPRET="1") == "0\n"
