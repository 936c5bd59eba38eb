"""Arms interleaved and shuffled in one process, one arm twice: ratios that know their own noise, on a CPU or a GPU."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from limits import Limit, limits_of
from torch.utils.flop_counter import FlopCounterMode

from u2a_fast import get_backend, set_backend
from u2a_fast.kernels import products
from u2a_fast.quantization import fast_dtype

T = TypeVar("T")
Arms = Mapping[str, Callable[[], Any]]
Rows = dict[str, dict[str, Any]]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = fast_dtype()  # what dtype "auto" is here
GEMM = "gemm"  # the arm that says what the machine can do: a product of the sizes below
GEMM_ROWS, GEMM_IN, GEMM_OUT = 1576, 768, 3072


# ----------------------------------------------------------------------------------------------------- the machine
def device_class() -> str:
    """Machines whose ratios may be compared: which dtypes are fast on them is what sets them apart."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    if torch.cpu._is_avx512_bf16_supported():
        return "cpu-avx512-bf16"
    return "cpu-avx512" if torch.cpu._is_avx512_supported() else "cpu-no-avx512"


def machine() -> dict[str, Any]:
    features = {
        "avx512": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "vnni": torch.cpu._is_vnni_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    return {
        "class": device_class(),
        "gpu": gpu,
        "features": features,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("u2a-fast", "torch", "transformers", "peft", "numpy")
        },
    }


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------------- timing
def seconds_of(run: Callable[[], Any]) -> float:
    """How long a call takes; on a GPU by its own events, once what ran before has ended."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def peak_bytes_of(run: Callable[[], Any]) -> int | None:
    """The most that a call had allocated on the GPU; a CPU does not say."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def rotating(make: Callable[[], T], nbytes: int) -> Iterator[T]:
    """Inputs of `nbytes` in turn, so many of them that none lies in a GPU's L2 any more when its turn comes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE.type == "cuda" else 0
    return itertools.cycle([make() for _ in range(1 + -(-2 * cache // nbytes))])


def compare(benchmark: Any, arms: Arms, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every arm in every round; pytest-benchmark times the rounds as a whole.

    `U2A_FAST_BENCH_ROUNDS` stands in for `rounds`, to try a bench out.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    generator = random.Random(0)
    rounds = max(2, int(os.environ.get("U2A_FAST_BENCH_ROUNDS", rounds)))  # quartiles need two
    warmup = min(warmup, rounds)

    def one_round() -> None:
        for name in generator.sample(list(arms), len(arms)):
            times[name].append(seconds_of(arms[name]))

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
    return {name: values[warmup:] for name, values in times.items()}


def gemm_arm(dtype: torch.dtype) -> Callable[[], Any]:
    """As fast as this machine multiplies: what PyTorch chooses, or oneDNN where that is faster."""
    x = torch.randn(GEMM_ROWS, GEMM_IN, device=DEVICE, dtype=dtype)
    weight = torch.randn(GEMM_OUT, GEMM_IN, device=DEVICE, dtype=dtype)
    return lambda: products.linear(x, weight)


# ---------------------------------------------------------------------------------------------------------- reports
def measure(
    benchmark: Any,
    arms: Arms,
    base: str,
    rounds: int,
    *,
    warmup: int = 2,
    dtype: torch.dtype = FAST,
    useful_flops: int | Mapping[str, int] | None = None,
    **facts: Any,
) -> Rows:
    """Time the arms, `base` twice, and record all that a figure needs: medians, quartiles, ratios to `base`, machine.

    Args:
        dtype: what the arms compute in, where their names say nothing else.
        useful_flops: operations that the question needs, whoever answers it, or of each arm where they answer different
            ones; then a product of `dtype` runs as one more arm, and every arm is given the fraction of its rate at
            which it did what was needed.
        facts: shapes, flops, bytes, saved bytes and what else the figure depends on.
    """
    control = f"{base} (A/A)"
    arms = {**arms, control: arms[base]}
    if useful_flops is not None:
        arms[GEMM] = gemm_arm(dtype)
    rows = report(compare(benchmark, arms, rounds, warmup), base, control)
    if useful_flops is not None:
        rate = 2 * GEMM_ROWS * GEMM_IN * GEMM_OUT / rows[GEMM]["median_s"]
        for name, row in rows.items():
            needed = useful_flops if isinstance(useful_flops, int) else useful_flops.get(name.removesuffix(" (A/A)"), 0)
            row["fraction_of_peak"] = 1.0 if name == GEMM else needed / row["median_s"] / rate
        facts |= {"useful_flops": useful_flops, "gemm_gflops": rate / 1e9}
        shown = {name: round(row["fraction_of_peak"], 3) for name, row in rows.items()}
        print(f"  fraction of the {rate / 1e9:.0f} GFLOP/s of a product: {shown}")
    if DEVICE.type == "cuda":
        facts["peak_bytes"] = {name: peak_bytes_of(arm) for name, arm in arms.items()}
    facts["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process, not of an arm
    benchmark.extra_info.update(rows=rows, base=base, dtype=name_of(dtype), machine=machine(), **facts)
    return rows


def report(times: Mapping[str, list[float]], base: str, control: str) -> Rows:
    """Median, quartiles and the ratio to `base` of every arm, and whether it is clear of the noise.

    The noise is the larger of what the two equal arms differ by and half the base arm's quartile spread.
    """
    quartiles = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in times.items()}
    low, median, high = quartiles[base]
    noise = max(abs(quartiles[control][1] / median - 1), (high - low) / (2 * median))
    rows = {}
    print(f"\nmedian seconds, {device_class()}, {torch.get_num_threads()} threads, noise {noise:.1%}")
    for name, (first, middle, third) in quartiles.items():
        ratio = middle / median
        clear = abs(ratio - 1) > noise
        said = "the base" if name == base else f"{ratio:.2f}x {base}" if clear else f"no result ({ratio:.2f}x)"
        print(f"  {name:20s} {middle:.5f}  quartiles {first:.5f} {third:.5f}  {said}")
        rows[name] = {"median_s": middle, "quartiles_s": [first, third], "ratio": ratio, "clear": clear, "noise": noise}
    return rows


def best(rows: Rows, names: Iterable[str]) -> float:
    """Seconds of the fastest of these arms."""
    return min(rows[name]["median_s"] for name in names)


def hold(benchmark: Any, figures: Mapping[str, float], noise: float = 0.0) -> None:
    """Record every figure beside the limit that this class of machine has for it, and fail where one is not kept.

    noise: by how much a figure may miss its limit before that is more than noise; for limits such as "not slower".
    """
    limits = limits_of(device_class())
    kept = {name: _kept(value, limits.get(name), noise) for name, value in figures.items()}
    benchmark.extra_info.setdefault("limits", {}).update(kept)
    for name, entry in kept.items():
        print(f"  {name}: {entry['figure']:.3f}{entry['said']}")
    missed = [f"{name} is {entry['figure']:.3f}{entry['said']}" for name, entry in kept.items() if not entry["kept"]]
    assert not missed, "; ".join(missed)


def _kept(figure: float, limit: Limit | None, noise: float) -> dict[str, Any]:
    if limit is None:
        return {"figure": figure, "limit": None, "kept": True, "said": " (no limit on this class)"}
    kept = figure <= limit.most + noise and figure >= limit.least - noise
    return {"figure": figure, "limit": limit.number, "kept": kept, "said": f", promised {limit}"}


# --------------------------------------------------------------------------------------------------------- counting
def counted_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of one call, as torch counts them; ours run in plain PyTorch so that it sees them."""
    backend = get_backend()
    set_backend("reference")
    try:
        with FlopCounterMode(display=False) as counter:
            step()
    finally:
        set_backend(backend)
    return counter.get_total_flops()


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)
