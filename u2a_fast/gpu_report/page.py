"""The page of verdicts: `README.md` beside the JSON, with two pictures. What the noise hides is called no result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .pictures import draw_fractions, draw_steps
from .timing import CONTROL, said

Results = dict[str, dict[str, Any]]
Entries = dict[str, dict[str, Any]]
PICTURES = {"steps.png": draw_steps, "fractions.png": draw_fractions}
BASE = "ours"  # the arm of (i) that all others are compared with


def write_page(results: Results, folder: Path, pictures: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if pictures:
        drawn = [name for name, draw in PICTURES.items() if draw(results, folder / name)]
    lines = [f"# GPU report: {title_of(results)}", ""]
    verdicts = [(f"({name}) {step['title']}", verdict(step), step["seconds"]) for name, step in results.items()]
    lines += table(("step", "verdict", "s"), verdicts)
    lines += [f"![{name}]({name})" for name in drawn] + [""]
    for name, step in results.items():
        body = BODIES[name](step["entries"]) if name in BODIES else []
        troubles = [f"- **{what}**: {trouble(entry)}" for what, entry in step["entries"].items() if trouble(entry)]
        if body or troubles:
            lines += [f"## ({name}) {step['title']}", "", *body, *grouped(troubles), ""]
    (folder / "README.md").write_text("\n".join(lines))


def title_of(results: Results) -> str:
    entries = results.get("a", {}).get("entries", {})
    device, versions = entries.get("device", {}), entries.get("versions", {})
    dry = " (a dry run: no figure means anything)" if any(step["dry"] for step in results.values()) else ""
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions)
    return f"{device.get('name', 'a device that was not asked')}{', ' + named if named else ''}{dry}"


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    shown = [" | ".join(map(str, row)) for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {row} |" for row in shown), ""] if shown else []


# ------------------------------------------------------------------------------------------------------------ verdicts
def verdict(step: dict[str, Any]) -> str:
    """How a step ended, in a line."""
    states = Counter(entry["state"] for entry in step["entries"].values())
    ended = "" if step["status"] == "done" else f"{step['status']}; "
    counts = ", ".join(f"{states[state]} {state}" for state in ("done", "wrong", "error", "no result") if states[state])
    return ended + (counts or "no result")


def trouble(entry: dict[str, Any]) -> str:
    if entry["state"] == "wrong":
        return "WRONG: " + "; ".join(entry["wrong"][:3])
    if entry["state"] == "error":
        return "ERROR: " + one_line(entry["error"])
    return "no result: " + one_line(entry["why"]) if entry["state"] == "no result" else ""


def one_line(text: str) -> str:
    return " ".join(text.split())[:240]


def grouped(troubles: list[str], most: int = 25) -> list[str]:
    """The first of many: the JSON has them all."""
    left = len(troubles) - most
    return [*troubles[:most], f"- and {left} more"] if left > 0 else troubles


# -------------------------------------------------------------------------------------------------------------- bodies
def machine(entries: Entries) -> list[str]:
    device, copy, product = (entries.get(name, {}) for name in ("device", "copy", "product"))
    facts = [f"{name} {device[name]}" for name in ("cuda", "multiprocessors", "memory_gib", "l2_mib") if name in device]
    facts += [f"copy {copy['gb_per_s']:.0f} GB/s"] if "gb_per_s" in copy else []
    facts += [f"bf16 product {product['tflops']:.0f} TFLOP/s"] if "tflops" in product else []
    smi = device.get("nvidia_smi", "").splitlines()
    return [", ".join(facts), *(f"    {line}" for line in smi), ""]


def binaries(entries: Entries) -> list[str]:
    built = entries.get("binaries", {})
    if "count" not in built:
        return []
    line = f"{built['count']} binaries for {built['target']} in {built['build_seconds']} s; "
    line += f"{len(built['too_large'])} fit on no multiprocessor, {len(built['spilling'])} spill"
    return [line, "", *(f"- {one}" for one in (*built["too_large"], *built["spilling"])), ""]


def correctness(entries: Entries) -> list[str]:
    """The worst case of each function and precision, in units of the error that is allowed."""
    worst: dict[str, dict[str, float]] = {}
    for name, entry in entries.items():
        function, dtype = name.split(", ")[0], name.split(", ")[-1]
        if "worst" in entry:
            of = worst.setdefault(function, {})
            of[dtype] = max(of.get(dtype, 0.0), entry["worst"])
    dtypes = sorted({dtype for of in worst.values() for dtype in of})
    rows = [(function, *(of.get(dtype, "") for dtype in dtypes)) for function, of in worst.items()]
    return ["Largest error in units of what is allowed:", "", *table(("function", *dtypes), rows)]


def whole_models(entries: Entries) -> list[str]:
    errors = {name: entry["errors"] for name, entry in entries.items() if "errors" in entry}
    rows = [(name, "; ".join(f"{b} {e:.1e}" for b, e in of.items())) for name, of in errors.items()]
    return table(("model", "relative error"), rows)


def waits(entries: Entries) -> list[str]:
    return [f"- {name}: {len(entry['waits'])}" for name, entry in entries.items() if "waits" in entry]


def products(entries: Entries) -> list[str]:
    """Fractions of the library's rate; what is within the noise of the library is marked."""
    timed = {name: entry for name, entry in entries.items() if "fraction" in entry}
    arms = list(dict.fromkeys(arm for entry in timed.values() for arm in entry["fraction"]))
    arms = [arm for arm in arms if arm not in ("library", "library" + CONTROL, "dX library")]
    rows = [
        (name, e["library_tflops"], *(marked(e["fraction"].get(arm), e["noise"]) for arm in arms), noise(e))
        for name, e in timed.items()
    ]
    shown = table(("product", "library, TFLOP/s", *arms, "A/A"), rows)
    return ["Fractions of the library's rate:", "", *shown, *how(timed)]


def marked(fraction: float | None, noise: float) -> str:
    return "" if fraction is None else said(fraction, noise)


def noise(entry: dict[str, Any]) -> str:
    return f"{entry['noise']:.1%}"


def how(timed: Entries) -> list[str]:
    """How they were timed, where not by graph."""
    ways = Counter(entry["how"] for entry in timed.values() if entry["how"] != "graph")
    return [f"{count} timed by {way}" for way, count in ways.items()]


def passes(entries: Entries) -> list[str]:
    timed = {name: entry for name, entry in entries.items() if "of_copy" in entry}
    rows = [(name, e["us"]["pass"], e["gb_per_s"], e["of_copy"], noise(e)) for name, e in timed.items()]
    return [*table(("pass", "us", "GB/s", "of a copy's", "A/A"), rows), *how(timed)]


def training_steps(entries: Entries) -> list[str]:
    """A table for each case; entries are named "case", "case: arm" and "case: kernels of arm", "case: steps of ..."."""
    lines = []
    for case in dict.fromkeys(name.split(":")[0] for name, entry in entries.items() if "wall" in entry):
        rows = [
            (arm, ratio_to_base(e, arm), *milliseconds(entries, case, arm, e), *kernels(entries, case, arm, e))
            for arm, e in arms_of(entries, case).items()
        ]
        head = (case, f"time over {BASE}", "wall ms", "in a row", "host ms", "device ms", "kernels", "peak MiB")
        lines += table(head, rows)
    return lines


def arms_of(entries: Entries, case: str) -> Entries:
    """{arm: the entry it was timed in}; an arm beside which the base ran once more stands in its own."""
    timed = [entry for name, entry in entries.items() if name.split(":")[0] == case and "wall" in entry]
    found: Entries = {}
    for entry in timed:
        for arm in entry["wall"]["ms"]:
            if not arm.endswith(CONTROL):
                found.setdefault(arm, entry)
    return found


def ratio_to_base(entry: dict[str, Any], arm: str) -> str:
    wall = entry["wall"]
    ratio = wall["ms"][arm] / wall["ms"][BASE]
    return f"1 (A/A {wall['noise']:.1%})" if arm == BASE else said(ratio, wall["noise"])


def milliseconds(entries: Entries, case: str, arm: str, timed: dict[str, Any]) -> tuple[Any, Any, Any]:
    found = entries.get(f"{case}: steps of {arm} in a row", {})
    return timed["wall"]["ms"][arm], found.get("in_a_row_ms", ""), timed["host"]["ms"][arm]


def kernels(entries: Entries, case: str, arm: str, timed: dict[str, Any]) -> tuple[Any, Any, Any]:
    found = entries.get(f"{case}: kernels of {arm}", {})
    return found.get("device_ms", ""), found.get("kernels", ""), timed["peak_mib"].get(arm) or ""


def variants(entries: Entries) -> list[str]:
    rows = []
    for name, entry in entries.items():
        if "noise" in entry:
            rows.append((name, f"time of masked SDPA over ours: {said(entry['ratio'], entry['noise'])}"))
        elif entry.get("ratio"):
            rows.append((name, f"device time over that of bf16: {entry['ratio']:.2f}; {entry['mib']} MiB of model"))
    return table(("what", "result"), rows)


BODIES: dict[str, Callable[[Entries], list[str]]] = {
    "a": machine,
    "b": binaries,
    "c": correctness,
    "d": whole_models,
    "f": waits,
    "g": products,
    "h": passes,
    "i": training_steps,
    "j": variants,
    "k": training_steps,
}
