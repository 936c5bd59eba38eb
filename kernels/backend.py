"""The one switch: which implementation of an op runs.

reference   plain PyTorch, differentiated by autograd: what the other two must equal
torch       ATen calls with hand-written backwards: the CPU path, and the GPU path without Triton
triton      our Triton kernels: CUDA and ROCm, or CPU tensors under TRITON_INTERPRET=1
auto        triton where bf16 or fp16 is computed in on the GPUs in targets.py, torch for all else; decided at each
            call, nothing is probed at import
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .targets import supports_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the torch backend needs none
    triton = tl = None

BACKENDS = ("auto", "reference", "torch", "triton")
NAMESPACE = "u2a_fast"  # of the registered ops: torch.ops.u2a_fast
MOST_AMD_STAGES = 2  # a multiprocessor of an MI300X has 64 KB of shared memory

_backend = "auto"
_recorded: list[Launch] | None = None
_copies: dict[int, torch.Tensor] = {}  # of tensors that are there as long as these are, by id
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


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
    first = next(t for t in tensors if t is not None)
    device = first.device
    for t in tensors:
        if t is not None and (t.device != device or type(t).__name__ == "DTensor"):
            _refuse(device, t)
    if _backend == "auto":
        return "torch" if first.is_cpu or not _fits_triton(first) else "triton"
    if _backend == "triton" and first.is_cpu and not interpreting():
        raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1 set before Python starts")
    return _backend


def _refuse(device: torch.device, t: torch.Tensor) -> None:
    if type(t).__name__ == "DTensor":
        raise TypeError("DTensor inputs are not supported: pass local tensors, for example t.to_local()")
    raise ValueError(f"all tensors of one call must be on one device, not on {device} and {t.device}")


def _fits_triton(t: torch.Tensor) -> bool:
    return triton is not None and supports_triton(t.device, compute_dtype(t))[0]  # of fp32 rows that of autocast


class Op:
    """One op: what runs in eager calls, and its registration for `torch.compile` and export.

    Eager calls go to the implementation itself, since the dispatcher costs as much as a small op does; while a graph is
    traced they go to the registered op, which the graph then holds. It has no autograd formula: an `autograd.Function`
    around the call differentiates it, eager or traced.

    Args:
        schema: `"name(Tensor x, ...) -> Tensor"`. Every result is a `Tensor`; one that was not asked for is None.
        aten: the implementation in ATen calls, for any device.
        fake: shapes and dtypes of the results.
        triton: the implementation in Triton kernels; None: `aten` everywhere.
    """

    def __init__(self, schema: str, aten: Callable, fake: Callable, triton: Callable | None = None):
        name = schema.split("(")[0]
        self.aten, self.triton = aten, triton or aten
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for device in ("CPU", "CUDA"):  # an exported program may be called with gradients on
            _library.impl(name, torch.no_grad()(self.run), device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        self.registered = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args):
        first = args[0] if args[0] is not None else _first_tensor(args)
        if torch.compiler.is_compiling():
            return self.registered(*args)
        if first.is_cpu and _backend != "triton":  # the shortest way for the smallest ops
            return self.aten(*args)
        return self.registered(*args) if isinstance(first, FakeTensor) else self.run(*args)

    def run(self, *args):
        """What the registered op runs."""
        return (self.triton if resolve(_first_tensor(args)) == "triton" else self.aten)(*args)


def _first_tensor(args: Iterable) -> torch.Tensor:
    return next(a for a in args if isinstance(a, torch.Tensor))


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors has to be recorded: an `autograd.Function` costs time even where it need not."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def under_autocast(device: str) -> bool:
    """Whether autocast is on for tensors of this type of device; the meta device knows none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What is computed in from x: the autocast dtype where autocast is on (float64 stays float64), else that of x."""
    device = "cpu" if x.is_cpu else x.device.type
    if under_autocast(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def in_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in the compute dtype."""
    return cast(x, compute_dtype(x))


def cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`t.to(dtype)`, which costs a call even where it changes nothing."""
    if t.dtype == dtype:
        return t
    copy = _copies.get(id(t))
    return t.to(dtype) if copy is None or copy.dtype != dtype or torch.is_grad_enabled() else copy


@contextlib.contextmanager
def cast_ahead(tensors: Iterable[tuple[torch.Tensor, torch.dtype]]) -> Iterator[None]:
    """Inside a Function, `cast` of these takes copies made here, all in a launch or two: there may be hundreds.

    >>> weight = torch.ones(2)
    >>> with cast_ahead([(weight, torch.bfloat16)]), torch.no_grad():
    ...     cast(weight, torch.bfloat16) is cast(weight, torch.bfloat16)
    True
    """
    global _copies
    given = list(tensors)
    with torch.no_grad():
        copies = [torch.empty_like(t, dtype=dtype) for t, dtype in given]
        if given:
            torch._foreach_copy_(copies, [t for t, _ in given])
    before, _copies = _copies, {id(t): copy for (t, _), copy in zip(given, copies, strict=True)}
    try:
        yield
    finally:
        _copies = before


def outside_autocast(function: Callable) -> Callable:
    """The backward of a Function, with autocast off: its dtypes are those of the forward, wherever it is called.

    It is differentiated once: what was kept of the forward carries no graph, so second derivatives would be wrong.
    """

    @functools.wraps(function)
    def run(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "u2a_fast.kernels have no second derivatives: leave create_graph=True out, or call "
                'set_backend("reference") before the forward'
            )
        given = grads[0] if grads[0] is not None else next((g for g in grads if g is not None), None)
        if given is None or not under_autocast(given.device.type):
            return function(ctx, *grads)
        with torch.autocast(given.device.type, enabled=False):
            return function(ctx, *grads)

    return run


def unrecorded() -> contextlib.AbstractContextManager:
    """For ops inside a Function: they pass by the dispatcher's layers that record for autograd.

    Nothing is recorded there anyway, yet passing through takes a sixteenth of a small block's time. A dispatch mode,
    such as selective checkpointing, has to see every op as autograd takes it apart, and each change of a tensor.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowADInplaceOrView()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: fp32, for float64 float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable | None = None, *, varying: tuple[str, ...] = ()) -> Callable:
    """`triton.jit`, or the function itself where Triton is not installed.

    `varying` names arguments that change from batch to batch: no binary is built for their being 1 or a multiple of 16.
    """
    if function is None:
        return functools.partial(jit, varying=varying)
    return function if triton is None else triton.jit(function, do_not_specialize=varying)


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The operands of a kernel that knows no strides."""
    return [None if t is None else t.contiguous() for t in tensors]


class Launch(NamedTuple):
    """A launch that was asked for."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are noted instead of run; on meta tensors nothing needs a device."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Callable, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run `kernel[grid](**arguments)`; an empty grid runs nothing.

    Triton's own interpreter multiplies the raw bit patterns of bfloat16, so under it a launch computes in fp32 and
    rounds what it wrote, and nothing else, on return.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments))
        return
    if not interpreting():
        if torch.version.hip is not None and "num_stages" in arguments:
            arguments["num_stages"] = min(arguments["num_stages"], MOST_AMD_STAGES)
        with torch.cuda.device_of(_first_tensor(arguments.values())):
            kernel[grid](**arguments)
        return
    wide = {n: _widened(a) if torch.is_tensor(a) and a.dtype == torch.bfloat16 else a for n, a in arguments.items()}
    kernel[grid](**wide)
    for name, original in arguments.items():
        if wide[name] is not original and not _same_bits(wide[name], original.float()):
            original.copy_(wide[name])


def _widened(t: torch.Tensor) -> torch.Tensor:
    """A copy of t in fp32, strides included, which may be arguments of a kernel too; expanded ones may overlap."""
    if t.numel() == 0:
        return t.float()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((last + 1,), (1,)).float().as_strided(t.shape, t.stride(), 0)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))  # NaN equals itself
