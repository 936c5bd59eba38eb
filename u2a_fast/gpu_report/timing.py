"""Time of calls on a GPU: what the GPU takes, not what the host takes to launch them.

A launch costs the host 25 to 50 us, more than most kernels take. So some ten calls over rotating inputs, together
larger than L2, are captured into one CUDA graph, and its replays are timed with events; L2 is overwritten before each.
Arms take turns in random order and the base runs twice (A/A): a difference within that noise is no result.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Calls = Sequence[Callable[[], Any]]
CONTROL = " (A/A)"
LEAST_CALLS, MOST_CALLS = 10, 64


def rotating(make: Callable[[], T], nbytes: int, dry: bool = False) -> list[T]:
    """Inputs of `nbytes` each, so many of them that they exceed twice the L2 cache together."""
    if dry:
        return [make() for _ in range(2)]
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return [make() for _ in range(min(MOST_CALLS, max(LEAST_CALLS, -(-2 * cache // max(1, nbytes)))))]


def compare(arms: Mapping[str, Calls], base: str, rounds: int, dry: bool = False) -> dict[str, Any]:
    """Microseconds of a call of each arm (median and quartiles), the noise, and `how` they were timed."""
    if dry:
        runs, how = {name: _all_of(calls) for name, calls in arms.items()}, "clock"
    else:
        runs, how = _prepared(arms)
    runs[base + CONTROL] = runs[base]
    seconds = _clock if dry else _Events()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for turn in range(rounds + 2):
        for name in order.sample(list(runs), len(runs)):
            taken = seconds(runs[name])
            if turn >= 2:
                times[name].append(1e6 * taken / len(arms[name.removesuffix(CONTROL)]))
    return {"how": how, **summary(times, base)}


def summary(times: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """Median and quartiles of each arm; noise: the larger of what the base differs from itself and half its spread."""
    quartiles = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in times.items()}
    low, middle, high = quartiles[base]
    noise = max(abs(quartiles[base + CONTROL][1] / middle - 1), (high - low) / (2 * middle))
    return {
        "us": {name: round(q[1], 3) for name, q in quartiles.items()},
        "quartiles": {name: [round(q[0], 3), round(q[2], 3)] for name, q in quartiles.items()},
        "noise": round(noise, 4),
    }


def is_clear(ratio: float, noise: float) -> bool:
    """Whether a ratio of times differs from 1 by more than the noise."""
    return abs(ratio - 1) > noise


def said(ratio: float, noise: float) -> str:
    return f"{ratio:.2f}" if is_clear(ratio, noise) else f"no result ({ratio:.2f})"


def _all_of(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _prepared(arms: Mapping[str, Calls]) -> tuple[dict[str, Callable[[], None]], str]:
    """All arms as graphs, or none: times taken in two ways do not compare."""
    try:
        return {name: captured(calls) for name, calls in arms.items()}, "graph"
    except Exception as error:
        torch.cuda.synchronize()
        why = f"events, host included, since capture failed: {type(error).__name__}: {str(error)[:200]}"
        return {name: _all_of(calls) for name, calls in arms.items()}, why


def captured(calls: Calls) -> Callable[[], None]:
    """The replay of a graph of these calls, each of which ran before on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _clock(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _Events:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], None]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000
