"""The one switch: which implementation of an op runs.

reference   plain PyTorch, differentiated by autograd: what the other two must equal
torch       ATen calls with hand-written backwards: the CPU path, and the GPU path without Triton
triton      our Triton kernels: CUDA and ROCm, or CPU tensors under TRITON_INTERPRET=1
auto        triton for tensors on a GPU (float64 excepted), torch for all others; decided at each call, nothing is
            probed at import
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the torch backend needs none
    triton = tl = None

BACKENDS = ("auto", "reference", "torch", "triton")
MOST_AMD_STAGES = 2  # a multiprocessor of an MI300X has 64 KB of shared memory

_backend = "auto"
_recorded: list[tuple[Callable, tuple[int, ...], dict]] | None = None


def set_backend(name: str) -> None:
    """Choose the implementation of every op: `"auto"`, `"reference"`, `"torch"` or `"triton"`.

    Raises:
        ValueError: unknown name, or `"triton"` where Triton is not installed.

    >>> set_backend("reference")
    >>> get_backend()
    'reference'
    >>> set_backend("auto")
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton" and triton is None:
        raise ValueError("backend 'triton' needs the package triton: pip install triton, or choose 'torch'")
    _backend = name


def get_backend() -> str:
    """The name given to `set_backend`, `"auto"` until then."""
    return _backend


def resolve(*tensors: torch.Tensor | None) -> str:
    """The backend for a call on these tensors: `"reference"`, `"torch"` or `"triton"`.

    Raises:
        TypeError: a tensor is a DTensor.
        ValueError: the tensors lie on different devices, or `"triton"` was chosen for CPU tensors without
            TRITON_INTERPRET=1.
    """
    given = [t for t in tensors if t is not None]
    device = given[0].device
    for t in given:
        if t.device != device:
            raise ValueError(f"all tensors of one call must be on one device, not on {device} and {t.device}")
        if type(t).__name__ == "DTensor":
            raise TypeError("DTensor inputs are not supported: pass local tensors, for example t.to_local()")
    if _backend != "auto":
        if _backend == "triton" and device.type == "cpu" and not interpreting():
            raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1 set before Python starts")
        return _backend
    on_gpu = device.type == "cuda" and triton is not None and given[0].dtype != torch.float64
    return "triton" if on_gpu else "torch"


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in the compute dtype: the autocast dtype where autocast is on (float64 stays float64), else x itself."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def outside_autocast(function: Callable) -> Callable:
    """The function of a backward, with autocast off: its dtypes are those of the forward, wherever it is called."""

    @functools.wraps(function)
    def run(*args):
        device = next(a for a in args if torch.is_tensor(a)).device.type
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: fp32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable) -> Callable:
    """`triton.jit`, or the function itself where Triton is not installed."""
    return function if triton is None else triton.jit(function)


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The operands of a kernel that knows no strides."""
    return [None if t is None else t.contiguous() for t in tensors]


def launch(kernel: Callable, grid: tuple[int, ...], *args, **options) -> None:
    """Run `kernel[grid](*args, **options)`; an empty grid runs nothing.

    Triton's own interpreter multiplies the raw bit patterns of bfloat16, so under it a launch computes in fp32 and
    rounds what it wrote, and nothing else, on return.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append((kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | options))
        return
    if not interpreting():
        if torch.version.hip is not None and "num_stages" in options:
            options["num_stages"] = min(options["num_stages"], MOST_AMD_STAGES)
        with torch.cuda.device_of(next(a for a in args if torch.is_tensor(a))):
            kernel[grid](*args, **options)
        return
    wide = [_widened(a) if torch.is_tensor(a) and a.dtype == torch.bfloat16 else a for a in args]
    kernel[grid](*wide, **options)
    for original, computed in zip(args, wide, strict=True):
        if computed is not original and not _same_bits(computed, original.float()):
            original.copy_(computed)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Callable, tuple[int, ...], dict]]]:
    """Inside, launches are not run: the list that is yielded receives (kernel, grid, arguments by name) of each."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _widened(t: torch.Tensor) -> torch.Tensor:
    """A copy of t in fp32, strides included, which may be arguments of a kernel too; expanded ones may overlap."""
    if t.numel() == 0:
        return t.float()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((last + 1,), (1,)).float().as_strided(t.shape, t.stride(), 0)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))  # NaN equals itself
