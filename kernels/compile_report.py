"""What our Triton kernels become on GPUs that need not be there: registers, spills, loads, occupancy, roofline.

    python -m u2a_fast.kernels.compile_report             a table
    python -m u2a_fast.kernels.compile_report --json      the rows, for programs
    python -m u2a_fast.kernels.compile_report --check     also the budgets; exit status 1 if one is broken

Triton compiles without a driver. What its assemblers make tells whether loads are 16 bytes wide, whether the matrix
units are used, whether registers spill, and how many blocks fit on one multiprocessor. `computed_us` is
max(bytes / bandwidth, operations / peak) from the data sheet of the target's device, every operand moved once: a bound
that was computed, never a time that was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch

from . import backend
from .backend import triton
from .compile_budgets import EARLIER_SPILLS, FLOPS, GEMMS, MATRIX_UNITS, MINIMUM_RATIO, RATIOS, SPILLING, SPILLS
from .compile_cases import CASES, SHAPES, VIT_B, Case, Shape, frozen_linear
from .tiling import MOST_RANKS


@dataclass(frozen=True)
class Device:
    """A data sheet: bytes/s, dense bf16 and int8 operations/s, shared memory of a multiprocessor and of one block.

    `binaries`: the target whose binaries it runs, where that is another one.
    """

    name: str
    bandwidth: float
    bf16: float
    int8: float
    shared: int
    shared_block: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    binaries: str | None = None


KB = 1024
CARD = {"shared": 100 * KB, "shared_block": 99 * KB, "warps": 48}
DEVICES = {
    "sm_80": Device("A100 80GB", 2.04e12, 312e12, 624e12, 164 * KB, 163 * KB),
    "sm_86": Device("RTX 3090", 0.936e12, 71e12, 284e12, **CARD, blocks=16),
    "sm_89": Device("RTX 4090", 1.008e12, 165e12, 661e12, **CARD, blocks=24, binaries="sm_86"),
    "sm_90": Device("H100 SXM", 3.35e12, 989e12, 1979e12, 228 * KB, 227 * KB),
    "sm_100": Device("B200", 8.0e12, 2250e12, 4500e12, 228 * KB, 227 * KB),
    "sm_120": Device("RTX 5090", 1.792e12, 209.5e12, 838e12, **CARD, blocks=24),
    "gfx90a": Device("MI250X, one die", 1.6e12, 191.5e12, 191.5e12, 64 * KB, 64 * KB),
    "gfx942": Device("MI300X", 5.3e12, 1307e12, 2614e12, 64 * KB, 64 * KB),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.uint8: "*u8"}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


# -------------------------------------------------------------------------------------------------- what is launched
@dataclass(frozen=True)
class Launch:
    """One launch seen from outside: what is compiled, what it moves and what it computes."""

    kernel: Callable
    signature: tuple[tuple[str, str], ...]  # argument, Triton type
    constants: tuple[tuple[str, object], ...]
    divisible: frozenset[str]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]
    bytes: int
    flops: int
    int8: bool

    @property
    def binary(self) -> tuple:
        """What decides the code, but for `divisible`."""
        return self.kernel.__name__, self.signature, self.constants, self.options


def record(run: Callable[[], object]) -> list[Launch]:
    """The launches that `run` makes on meta tensors; nothing runs."""
    with backend.recording() as launches:
        run()
    return [_describe(kernel, arguments) for kernel, _, arguments in launches]


def launches_of(case: Case, shape: Shape) -> list[Launch]:
    return record(lambda: case.run(replace(shape, dtype=case.dtype), case.rank))


def _describe(kernel: Callable, arguments: dict) -> Launch:
    values = {p.name: arguments[p.name] for p in kernel.params}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or values[p.name] is None}
    tensors = [v for v in values.values() if torch.is_tensor(v)]
    return Launch(
        kernel=kernel,
        signature=tuple((k, "constexpr" if k in constants else _type(v)) for k, v in values.items()),
        constants=tuple(sorted(constants.items())),
        divisible=frozenset(p.name for p in kernel.params if p.name not in constants and _divisible(p, values[p.name])),
        options=tuple((k, arguments[k]) for k in LAUNCH_OPTIONS if k in arguments),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        flops=FLOPS[kernel.__name__](values),
        int8=tensors[0].dtype == torch.int8,
    )


def _type(value) -> str:
    if torch.is_tensor(value):
        return POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if value < 2**31 else "i64"
    return "fp32"


def _divisible(parameter, value) -> bool:
    """Whether Triton would find by itself that the argument is a multiple of 16."""
    if torch.is_tensor(value):
        return True
    specialised = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    return specialised and isinstance(value, int) and value % 16 == 0


# --------------------------------------------------------------------------------------------------- what it becomes
def compile_launch(launch: Launch, target: str) -> dict:
    """Compile for `target` and read the listing: regs, spills, shared_bytes, mma, loads, warps."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    names = launch.kernel.arg_names
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in launch.divisible}
    options = dict(launch.options) | {"enable_fp_fusion": True}
    if amd and "num_stages" in options:
        options["num_stages"] = min(options["num_stages"], backend.MOST_AMD_STAGES)
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constants), attributes)
    compiled = triton.compile(source, target=gpu, options=options)
    found = _read_amd(compiled.asm["amdgcn"]) if amd else _read_nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
    found["shared_bytes"] = compiled.metadata.shared
    return found | {"warps": compiled.metadata.num_warps}


def _read_nvidia(ptx: str, cubin: bytes) -> dict:
    """Registers and stack of the binary; the rest from the PTX, whose loads and matrix instructions map one to one."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    count = lambda pattern: len(re.findall(pattern, ptx))  # noqa: E731
    tensor_copies = count(r"cp\.async\.bulk")
    return {
        "regs": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
        "mma": count(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"),
        "loop_loads": count(r"cp\.async\.c[ag]") + tensor_copies,
        "loop_loads16": count(r"cp\.async\.cg[^;]*\], 0x10") + tensor_copies,
        "vec16_loads": count(r"cp\.async\.cg[^;]*\], 0x10|ld\.global[\w.:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)")
        + tensor_copies,
    }


def _read_amd(listing: str) -> dict:
    loads = re.findall(r"^\s+(?:global|buffer)_load_(\w+)", listing, re.M)
    wide = sum(load.startswith("dwordx4") for load in loads)
    return {
        "regs": int(re.search(r"\.vgpr_count:\s+(\d+)", listing)[1]),
        "spills": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", listing)[1]),
        "mma": len(re.findall(r"^\s+v_mfma", listing, re.M)),
        "loop_loads": len(loads),
        "loop_loads16": wide,
        "vec16_loads": wide,
        "waves": int(re.search(r"; Occupancy: (\d+)", listing)[1]),
    }


def occupancy(target: str, found: dict) -> int:
    """Blocks that fit on one multiprocessor."""
    device, shared, warps = DEVICES[target], found["shared_bytes"], found["warps"]
    if shared > device.shared_block:
        return 0
    if target.startswith("gfx"):
        by_shared = device.shared // shared if shared else device.blocks
        return min(found["waves"] * 4 // warps, by_shared)  # four SIMD units
    per_warp = -(-found["regs"] * 32 // 256) * 256  # registers are handed out 256 at a time, to four schedulers
    by_registers = device.registers // per_warp // 4 * 4 // warps
    by_shared = device.shared // (-(-(shared + 1024) // 128) * 128)  # 1 KiB of each block is the system's
    return min(by_registers, by_shared, device.warps // warps, device.blocks)


def computed_us(launch: Launch, target: str) -> float:
    return _microseconds(launch.bytes, launch.flops, DEVICES[target], launch.int8)


def _microseconds(bytes: int, flops: int, device: Device, int8: bool) -> float:
    return 1e6 * max(bytes / device.bandwidth, flops / (device.int8 if int8 else device.bf16))


# ---------------------------------------------------------------------------------------------------------- the report
def report(cases=CASES, targets=tuple(DEVICES), processes: int = 2) -> list[dict]:
    """One row per launch and target. Launches that differ in sizes alone share one binary, compiled for all of them."""
    built_for = {target: DEVICES[target].binaries or target for target in targets}
    launches = [
        (case, shape, launch, target)
        for case in cases
        for shape in SHAPES
        for launch in launches_of(case, shape)
        for target in targets
        if built_for[target] in case.targets
    ]
    jobs: dict[tuple, tuple[Launch, str]] = {}
    for *_, launch, target in launches:
        key = launch.binary, built_for[target]
        other, _ = jobs.get(key, (launch, target))
        jobs[key] = replace(launch, divisible=launch.divisible & other.divisible), built_for[target]
    found = dict(zip(jobs, _compile_all(list(jobs.values()), processes), strict=True))
    return [_row(*entry, found[entry[2].binary, built_for[entry[3]]]) for entry in launches]


def _compile_all(jobs: list[tuple[Launch, str]], processes: int) -> list[dict]:
    global _jobs  # inherited by the forked processes: kernels cannot be pickled
    _jobs = jobs
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _prepare_worker) as pool:
        return list(pool.map(_compile_job, range(len(jobs))))


def _prepare_worker() -> None:
    """A parent that is killed cannot stop its pool, so each worker watches for its end."""
    gc.disable()  # a twelfth of the time: it would walk through all that was imported, again and again

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _compile_job(index: int) -> dict:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a fifth of the time; the code is the same
    return compile_launch(*_jobs[index])


def _row(case: Case, shape: Shape, launch: Launch, target: str, found: dict) -> dict:
    name = launch.kernel.__name__
    return {
        "kernel": name if name.startswith(case.function) else f"{case.function}.{name}",
        "function": case.function,
        "phase": case.phase,
        "variant": case.variant,
        "shape": shape.model,
        "rank": case.rank,
        "target": target,
        **found,
        "occupancy": occupancy(target, found),
        "bytes": launch.bytes,
        "flops": launch.flops,
        "computed_us": round(computed_us(launch, target), 2),
    }


# --------------------------------------------------------------------------------------------------------- the budgets
def broken_budgets(rows: list[dict]) -> list[str]:
    """What is over budget, one sentence each."""
    faults = dict.fromkeys(f"{_label(row)}: {fault}" for row in rows for fault in _faults(row))  # once for all shapes
    return [*faults, *_ratios_over(rows), *_bytes_over()]


def _label(row: dict) -> str:
    return f"{row['kernel']} ({row['variant']}, r = {row['rank']}, {row['target']})"


def _faults(row: dict) -> list[str]:
    kernel = row["kernel"].split(".")[-1]
    pipelined_bf16 = kernel in GEMMS and row["variant"] == "bf16"
    spills = SPILLS.get(kernel, 0) if row["rank"] == MOST_RANKS and row["target"] in SPILLING else 0
    if not spills and triton.__version__.startswith(("3.6.", "3.7.", "3.8.")):
        spills = EARLIER_SPILLS.get((kernel, row["target"]), 0)
    checks = {
        f"{row['spills']} bytes of registers spill": row["spills"] > spills,
        f"{row['shared_bytes']} bytes of shared memory fit on no multiprocessor": row["occupancy"] == 0,
        "no matrix instruction": kernel in MATRIX_UNITS and row["mma"] == 0,
        "no 16-byte load": kernel in MATRIX_UNITS and row["vec16_loads"] == 0,
        "no 16-byte load in the K loop": kernel in GEMMS and row["loop_loads16"] == 0,
        f"{row['occupancy']} block per multiprocessor": pipelined_bf16
        and row["target"] == "sm_90"
        and row["occupancy"] < 2,
    }
    return [fault for fault, is_broken in checks.items() if is_broken]


def computed_total(rows: list[dict], function: str, phase: str, variant: str, **where) -> float:
    """Computed microseconds of a case on an H100; by default ViT-B at rank 8."""
    where = {"shape": VIT_B.model, "rank": 8, "target": "sm_90"} | where
    where |= {"function": function, "phase": phase, "variant": variant}
    chosen = [row["computed_us"] for row in rows if all(row[k] == v for k, v in where.items())]
    if not chosen:
        raise ValueError(f"no row of the report has {where}")
    return sum(chosen)


def computed_ratios(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """{what: (computed time over that of the frozen product alone, limit)}"""
    alone = _microseconds(*frozen_linear(VIT_B), DEVICES["sm_90"], int8=False)
    return {
        what: (library + sum(times * computed_total(rows, *case) for case, times in parts.items()) / alone, limit)
        for what, limit, library, parts in RATIOS
    }


def _ratios_over(rows: list[dict]) -> list[str]:
    ratios = computed_ratios(rows)
    return [
        f"{what}: computed {r:.2f} of the frozen product alone, over {limit}"
        for what, (r, limit) in ratios.items()
        if r > limit
    ]


def _bytes_over() -> list[str]:
    broken = []
    for case in CASES:
        for shape in SHAPES if case.minimum_bytes else ():
            moved = sum(launch.bytes for launch in launches_of(case, shape))
            least = case.minimum_bytes(shape, case.rank)
            if moved > MINIMUM_RATIO * least:
                what = f"{case.function} {case.phase} ({case.variant}, {shape.model}, r = {case.rank})"
                broken.append(f"{what}: moves {moved / least:.3f} times the {least} bytes it must")
    return broken


# -------------------------------------------------------------------------------------------------------- command line
COLUMNS = ("kernel", "variant", "shape", "rank", "target", "regs", "spills", "shared_bytes", "mma", "vec16_loads")
COLUMNS += ("occupancy", "bytes", "flops", "computed_us")


def print_table(rows: list[dict]) -> None:
    cells = [COLUMNS, *([str(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    devices = ", ".join(f"{target} {device.name}" for target, device in DEVICES.items())
    print(f"\ncomputed_us: from counted bytes and operations and data sheets ({devices}); computed, never measured")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m u2a_fast.kernels.compile_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a budget is broken")
    options = parser.parse_args(arguments)
    if triton is None or backend.interpreting():
        print("the report needs the package triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    rows = report()
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(rows)
    if not options.check:
        return 0
    broken = broken_budgets(rows)
    for what, (ratio, limit) in computed_ratios(rows).items():
        print(f"{what}: computed {ratio:.2f} of the frozen product alone, at most {limit}", file=sys.stderr)
    print("\n".join(broken) or "every budget is kept", file=sys.stderr)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
