"""Arms interleaved and shuffled in one process, with one arm twice: ratios that know their own noise."""

from __future__ import annotations

import importlib.metadata
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from u2a_fast import get_backend, set_backend

Times = dict[str, list[float]]


def compare(benchmark: Any, arms: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Times:
    """Seconds of every arm in every round; pytest-benchmark times the rounds as a whole."""
    times: Times = {name: [] for name in arms}
    generator = random.Random(0)

    def one_round() -> None:
        for name in generator.sample(list(arms), len(arms)):
            start = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
    return {name: values[warmup:] for name, values in times.items()}


def report(times: Times, base: str, control: str) -> dict[str, dict[str, Any]]:
    """Median, quartiles and the ratio to `base` of every arm; the ratio is None where it is within the noise.

    The noise is the larger of what the two equal arms differ by and half the base arm's quartile spread.
    """
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    low, median, high = quartiles[base]
    noise = max(abs(quartiles[control][1] / median - 1), (high - low) / (2 * median))
    rows = {}
    print(f"\nmedian seconds, {torch.get_num_threads()} threads, noise {noise:.1%}")
    for name, (first, middle, third) in quartiles.items():
        ratio = middle / median
        clear = abs(ratio - 1) > noise
        said = "the base" if name == base else f"{ratio:.2f}x {base}" if clear else f"no result ({ratio:.2f}x)"
        print(f"  {name:16s} {middle:.4f}  quartiles {first:.4f} {third:.4f}  {said}")
        rows[name] = {"median_s": middle, "quartiles_s": [first, third], "ratio": round(ratio, 3) if clear else None}
    return rows


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


def versions() -> dict[str, str]:
    names = ("u2a-fast", "torch", "transformers", "peft", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
