"""The steps of the report: which module measures each, and its share of the time."""

from __future__ import annotations

from dataclasses import dataclass


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


STEPS = {  # in the order in which they run: those that take no times beside each other, what matters most first
    "a": Step("machine", "device, versions, ceilings", 1),
    "b": Step("binaries", "every binary: seconds, registers, spills", 6, alone=False),
    "c": Step("correctness", "every kernel against fp64 on the CPU", 12, parts=8, alone=False, proves=True),
    "d": Step("whole_models", "whole models: triton = torch = reference", 8, alone=False, proves=True),
    "e": Step("sanitizer", "compute-sanitizer", 8, parts=4, alone=False, proves=True),
    "f": Step("waiting", "synchronisations and graph capture", 5, alone=False, proves=True),
    "i": Step("u2a_step", "a U2A step, ViT-B + BERT-base", 22),
    "g": Step("products", "products against the library's", 6),
    "h": Step("passes", "memory-bound passes", 3),
    "j": Step("variants", "varlen attention, int8, nf4", 6),
}
