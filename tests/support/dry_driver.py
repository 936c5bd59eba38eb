"""A Triton driver without a device: everything that happens before a launch happens, on CPU tensors.

    with dry("sm_90") as device:            # the ops of u2a_fast.kernels run their Triton kernels
        y = kernels.lora_linear(...)        # of the right shape; what it holds is undefined
    device.launches                         # Counter of kernel names
    device.variants                         # (kernel, specialisation): one binary each
    device.binaries                         # what was compiled: kernel, shared, registers, spills

Inside, `kernel[grid](...)` binds and specialises its arguments, compiles for the target with that target's assembler,
and Triton refuses what exceeds the target's shared memory; only the launch itself does nothing. Targets are the keys of
SHARED. Every `dry` is a new device to Triton, so that nothing depends on what ran before; its cache on disk makes what
was once compiled cheap. `compiles=False` stops before the compiler, to count launches and variants at no cost.

Not seen: values, faults and time of a GPU. What the host spends on a launch is real once all is compiled:

    with dry("sm_90"):
        block(tokens)                       # compiles
        seconds = timed(lambda: block(tokens))
        set_backend("torch")                # as without a dry device
        seconds_of_torch = timed(lambda: block(tokens))
"""

import collections
import contextlib
import functools
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from u2a_fast.kernels import backend, targets

KB = 1024
SHARED = {  # of one block, by the data sheets
    "sm_80": 163 * KB,
    "sm_86": 99 * KB,
    "sm_89": 99 * KB,
    "sm_90": 227 * KB,
    "sm_100": 227 * KB,
    "sm_120": 99 * KB,
    "gfx90a": 64 * KB,
    "gfx942": 64 * KB,
}
MOST_THREADS = 1024
_numbers = itertools.count()


# ------------------------------------------------------------------------------------------------------- the front door
@contextlib.contextmanager
def dry(target: str, compiles: bool = True, auto: bool = False):
    """Run the ops' Triton kernels for `target` without launching them; yields the `DryDevice`."""
    device, before = DryDevice(target, compiles), driver._active
    hip = "6.4" if device.amd else None

    def resolve(*tensors):
        first = next(t for t in tensors if t is not None)
        refused = auto and not device.supports(backend.compute_dtype(first))
        return "torch" if refused else backend.get_backend()

    with (
        mock.patch.object(backend, "_backend", "triton"),
        mock.patch.object(backend, "resolve", resolve),
        mock.patch.object(targets, "architecture", lambda index: target),
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext),
        knobs.compilation.scope(),
        knobs.runtime.scope(),
    ):
        knobs.compilation.disable_line_info = True  # a fifth of the time; the code is the same
        knobs.runtime.jit_cache_hook = device.on_new_variant
        driver.set_active(device)
        try:
            yield device
        finally:
            device.forget()
            driver.set_active(before)  # reset_active() would look for a GPU


@dataclass(frozen=True)
class Binary:
    """What one kernel became: bytes of shared memory, and on demand registers and bytes of spills."""

    kernel: str
    shared: int
    code: bytes
    amd: bool

    @functools.cached_property
    def _usage(self) -> tuple[int, int]:
        return _usage_amd(self.code) if self.amd else _usage_nvidia(self.code)

    @property
    def registers(self) -> int:
        return self._usage[0]

    @property
    def spills(self) -> int:
        return self._usage[1]


# -------------------------------------------------------------------------------------------------- what Triton asks of
class DryDevice:
    """The driver, its utilities and its launcher in one: all that Triton 3.9 asks of them."""

    def __init__(self, target: str, compiles: bool):
        self.amd = target.startswith("gfx")
        self.name = f"{target} number {next(_numbers)}"  # what Triton files binaries under
        self.shared = SHARED[target]
        self.target = GPUTarget("hip", target, 64) if self.amd else GPUTarget("cuda", int(target[3:]), 32)
        self.compiles = compiles
        self.launches: collections.Counter[str] = collections.Counter()
        self.variants: set[tuple[str, str]] = set()
        self.binaries: list[Binary] = []
        self._kernels: list[triton.JITFunction] = []

    def supports(self, dtype: torch.dtype) -> bool:
        """What `auto` asks of a GPU; not of the cache, which knows the GPUs of this machine."""
        return targets._gpu_supports.__wrapped__(0, dtype)[0]

    def on_new_variant(self, *, key, fn, **_) -> bool:
        """Triton asks before it compiles; told True, it neither compiles nor launches, and asks again the next time."""
        kernel = fn.jit_function.__name__
        self._kernels.append(fn.jit_function)
        self.variants.add((kernel, key))
        if not self.compiles:
            self.launches[kernel] += 1
        return not self.compiles

    def forget(self) -> None:
        """Drop the binaries that Triton keeps: left alone, they would look for a driver when they are collected."""
        for kernel in self._kernels:
            kernel.device_caches.pop(self.name, None)

    @property
    def utils(self):
        return self

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared}

    def load_binary(self, name, code, shared, device):
        """(module, function, registers, spills, threads of a block)"""
        self.binaries.append(Binary(name, shared, code, self.amd))
        return "module", "function", 0, 0, MOST_THREADS

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            self.launches[metadata.name] += 1

        return launch


def _usage_nvidia(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", listing)[1]), int(re.search(r"STACK:(\d+)", listing)[1])


def _usage_amd(hsaco: bytes) -> tuple[int, int]:
    return _noted(hsaco, b".vgpr_count"), _noted(hsaco, b".private_segment_fixed_size")


def _noted(hsaco: bytes, key: bytes) -> int:
    """A number from the notes of the binary, which are MessagePack: below 128 a byte, else a tag and 1, 2 or 4."""
    tag, *rest = hsaco.partition(key)[2][:5]
    return tag if tag < 128 else int.from_bytes(bytes(rest[: {0xCC: 1, 0xCD: 2, 0xCE: 4}[tag]]), "big")
