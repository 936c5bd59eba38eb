"""Every kernel, forward and backward, against its formula in fp64 on the CPU.

The error is at most twice (gradients: three times) that of the reference backend in the same precision on the same
device or, since that adds up in another order, on the CPU, and no smaller than the rounding of the result itself.
Tensor cores cut operands to TF32 where a library may round them: what the reference loses with cut ones counts, and so
does in fp32 what PyTorch's own attention loses in a block: on a CPU more than the formula. Each runs once over memory
that was filled with NaN, and twice more, whose bits must be the same where all kernels are ours. A GPU computes through
Triton and through ATen.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import get_backend, set_backend
from .cases import Case, Draw, Operands
from .cases_modern import CASES
from .report import Entry, Report

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
FORWARD, BACKWARD = 2, 3  # times the error of plain low precision
SUMS = 16 * torch.finfo(torch.float32).eps  # of the largest value: what the order of fp32 sums may change


def measure(report: Report) -> None:
    backends = ["torch"] if report.dry else ["triton", "torch"]
    own = sorted({(dtype, case.function) for case in CASES for dtype in case.dtypes})
    own = [key for key in own if not (report.dry and key[0] in ("tf32", "fp16"))][report.part :: report.parts]
    for dtype, function in own:
        for case in CASES:
            if case.function == function and dtype in case.dtypes:
                report.measure(f"{function}, {case.name}, {dtype}", check, case, dtype, report.device, backends)


def check(case: Case, name: str, device: torch.device, backends: list[str]) -> Entry:
    """What is wrong with a case in a precision, and the largest error in units of what is allowed."""
    dtype, wrong, worst = DTYPES[name], [], 0.0
    made = case.make(Draw(dtype))
    with tf32(name == "tf32"):
        exact = results(case, made, torch.device("cpu"), "reference", torch.float64)
        plain = [results(case, made, where, "reference", dtype) for where in {device, torch.device("cpu")}]
        if name == "tf32":
            with CutToTF32():
                plain.append(results(case, made, torch.device("cpu"), "reference", dtype))
        if case.in_library is not None and name == "fp32":
            plain.append(results(replace(case, formula=case.in_library), made, device, "reference", dtype))
        for backend in backends:
            ours = backend == "triton" or device.type == "cpu"  # a GPU's library may add up in any order
            with filled_with_nan():
                over_nan = results(case, made, device, backend)
            first, second = (results(case, made, device, backend) for _ in range(2))
            for what in exact:
                for run, got in (("", first), (" over NaN", over_nan)):
                    factor = BACKWARD if what.startswith("d ") else FORWARD
                    used = share_of_allowed(got[what], [p[what] for p in plain], exact[what], factor)
                    worst = max(worst, used)
                    if not used <= 1:
                        wrong.append(f"{backend}: {what}{run}: {used:.3g} times the error that is allowed")
                if case.bitwise and ours and not same_bits(first[what], second[what]):
                    wrong.append(f"{backend}: {what}: two runs differ")
    return {"wrong": wrong, "worst": round(worst, 3)}


def results(
    case: Case, made: Operands, device: torch.device, backend: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs by name and "d name" for each gradient, on the CPU; all operands in `dtype` where one is given."""
    operands = {n: placed(n, t, device, dtype, n in case.strided) for n, t in made.items()}
    leaves = {n: operands[n].requires_grad_() for n in case.trained if operands.get(n) is not None}
    call = case.formula if backend == "reference" and case.formula is not None else case.call
    before = get_backend()
    set_backend(backend)
    try:
        outputs = {n: t for n, t in call(operands).items() if t is not None}
        grads = gradients(outputs, leaves)
    finally:
        set_backend(before)
    return {n: t.detach().cpu() for n, t in (outputs | grads).items()}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random combination of all outputs."""
    through = {n: t for n, t in outputs.items() if t.requires_grad}
    if not through:
        return {}
    weights = [weight_of(n, t) for n, t in through.items()]
    grads = torch.autograd.grad(list(through.values()), list(leaves.values()), weights)
    return {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def weight_of(name: str, t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return (torch.randn(t.shape, generator=generator, dtype=torch.float64) + 0.3).to(t)


def placed(name: str, value: Any, device: torch.device, dtype: torch.dtype | None, strided: bool) -> Any:
    if not torch.is_tensor(value):
        return value
    if value.is_floating_point() and dtype is not None:
        value = value.to(torch.promote_types(dtype, torch.float32) if name.endswith("weight_scale") else dtype)
    value = value.detach().to(device, copy=True)
    return torch.stack([value, torch.full_like(value, float("nan"))], -1).flatten(-2)[..., ::2] if strided else value


def share_of_allowed(got: Tensor, plain: list[Tensor], exact: Tensor, factor: int) -> float:
    """The error of `got` in units of what it may be; infinite where a shape differs or a value is not finite."""
    if got.shape != exact.shape:
        return float("inf")
    if exact.numel() == 0:
        return 0.0
    error, *of_plain = ((t.double() - exact).abs().max().item() for t in (got, *plain))
    rounding = 0.5 * torch.finfo(got.dtype).eps + SUMS
    used = error / (factor * max(of_plain) + rounding * exact.abs().max().item() + torch.finfo(torch.float64).tiny)
    return used if used == used else float("inf")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """Inside, memory that nothing was written to yet holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it nothing is filled
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Inside, products of fp32 may be rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(matmul, "fp32_precision") else ("allow_tf32", True)
    before = getattr(matmul, name)
    if on:
        setattr(matmul, name, value)
    try:
        yield
    finally:
        if on:
            setattr(matmul, name, before)


class CutToTF32(TorchDispatchMode):
    """Inside, a product of fp32 reads of each operand the sign, the exponent and ten bits of the fraction."""

    PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        first = self.PRODUCTS.get(func.overloadpacket)
        if first is not None:  # what is added to the product is no operand of it
            args = (*args[:first], *(cut(t) if t.dtype == torch.float32 else t for t in args[first:]))
        return func(*args, **(kwargs or {}))


def cut(t: Tensor) -> Tensor:
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def main(function: str, name: str, dtype: str) -> None:
    """Run one case through Triton, for compute-sanitizer to watch."""
    case = next(case for case in CASES if (case.function, case.name) == (function, name))
    results(case, case.make(Draw(DTYPES[dtype])), torch.device("cuda"), "triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
