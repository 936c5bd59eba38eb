"""The steps of the report: which module measures each, and its share of the time."""

from __future__ import annotations

import os
from dataclasses import dataclass

MOST_CORES = 16  # a container may be given fewer than it shows


@dataclass(frozen=True)
class Step:
    """`parts` processes of it run beside each other; `alone`: nothing else may run meanwhile, since times are taken.

    `proves`: an error or a wrong result there fails the report.
    """

    module: str
    title: str
    share: float
    parts: int = 1
    alone: bool = True
    proves: bool = False


# Those that take no times run beside each other, after (a); the others in this order. Compiling takes what (i) is left.
STEPS = {
    "a": Step("machine", "device, versions, ceilings", 3),
    "b": Step("binaries", "every binary: seconds, registers, spills", 14, alone=False),
    "c": Step("correctness", "every kernel against fp64 on the CPU", 14, parts=8, alone=False, proves=True),
    "d": Step("whole_models", "whole models: triton = torch = reference", 14, alone=False, proves=True),
    "e": Step("sanitizer", "compute-sanitizer", 14, parts=4, alone=False, proves=True),
    "f": Step("waiting", "synchronisations and graph capture", 14, alone=False, proves=True),
    "g": Step("products", "products against the library's", 8),
    "h": Step("passes", "memory-bound passes", 4),
    "j": Step("variants", "varlen attention, int8, nf4", 6),
    "k": Step("modern_step", "a step of one encoder of the 2020s", 6),
    "i": Step("u2a_step", "a U2A step, ViT-B + BERT-base", 16),
}


def cores() -> int:
    return min(MOST_CORES, len(os.sched_getaffinity(0)))
