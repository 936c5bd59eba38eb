"""From a run of the benches to what people read.

    python benches/summary.py run.json       results/<class>.json, .csv and charts, and a table of ratios
    python benches/summary.py --readme       the figures of docs/speed.md, out of results/*.json

`run.json` is what `pytest benches --benchmark-only --benchmark-json=run.json` wrote; `make bench` runs both.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from charts import draw
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
START, END = "<!-- figures: python benches/summary.py --readme -->", "<!-- end of figures -->"

Result = dict[str, Any]

# Which figures the page shows, and what it calls them; `benches/results` has all.
HEADLINES = {
    "u2a_step ViT-B + BERT-base, 70% missing: gain over the best PEFT arm": (
        "U2A step, ViT-B + BERT-base, batch 16, texts of 8 to 128 tokens, 70% missing, against the best PEFT arm"
    ),
    "u2a_step ViT-B + BERT-base, full presence: gain over the best PEFT arm": "the same, everything present",
    "u2a_step ViT-B + BERT-base, 70% missing: gain of int8 W8A8 over the best PEFT arm": "int8 W8A8, 70% missing",
    "u2a_step ViT-B + BERT-base, 70% missing: gain over PEFT fp32": "against PEFT's default, 70% missing",
    "u2a_step emoji: gain over the best PEFT arm": "U2A step, emoji encoders, batch 32, 70% missing",
    "modern_encoders ModernBERT-base: gain over the best PEFT arm": (
        "LoRA step of one encoder, ModernBERT-base, 4 texts of 256 tokens, against the best PEFT arm"
    ),
    "modern_encoders ModernBERT-base, padded: gain over the best PEFT arm": "the same, 8 texts of 16 to 256 tokens",
    "modern_encoders Qwen3-Embedding-0.6B, 2 layers: gain over the best PEFT arm": (
        "the same, two layers of Qwen3-Embedding-0.6B, 8 texts of 256 tokens"
    ),
    "modern_encoders DINOv3-S: gain over the best PEFT arm": "the same, DINOv3-S, 16 pictures of 224 pixels",
    "u2a_step: padded over the same rows without padding": "step with padded texts over the same rows without padding",
    "u2a_step: worst deviation from a line in real rows": "worst deviation of a step's time from a line in real rows",
    "block ViT-B: fraction of the GEMM peak": "ViT-B block, forward and backward: fraction of the GEMM peak",
    "block BERT-base: fraction of the GEMM peak": "BERT-base block, the same",
    "lora_linear 768 -> 3072, r 8: over frozen": "linear with LoRA, 768 -> 3072, r 8, over the frozen one",
    "lora_linear 768 -> 768, r 8: over frozen": "the same, 768 -> 768",
    "attention, 197 tokens: gain over SDPA": "attention of 197 tokens, forward and backward, against SDPA",
    "pmf layer over plain layers, fp32": "PMF fusion layer over plain frozen layers, fp32, 1 thread",
    "pmf layer over plain layers, bf16": "the same, bf16",
    "cache: gain of a cached epoch": "PMF epoch out of the feature cache, against the first",
    "int8: W8A8 block forward, gain over bf16": "ViT-B block forward, int8 x int8 against bf16",
    "int8: W8A8 block forward, gain over Linear8bitLt": "the same against bitsandbytes' Linear8bitLt",
    "memory: saved bytes over PEFT": "bytes kept for backward, over PEFT's under autocast (counted)",
    "memory: saved bytes with checkpointing over PEFT": "the same with activation checkpointing (counted)",
}


# ------------------------------------------------------------------------------------------------------- a run's file
def read_run(path: Path) -> tuple[str, list[Result]]:
    """The class of the machine, and what every bench recorded. Benches that failed to hold a limit are there too."""
    results = []
    for bench in json.loads(path.read_text())["benchmarks"]:
        if "machine" not in bench["extra_info"]:
            continue  # a check beside the benches, which measures nothing
        file, test = bench["fullname"].rsplit("/", 1)[-1].split("::")
        question = file.removeprefix("test_").removesuffix(".py")
        results.append({"question": question, "case": _case(question, test), **bench["extra_info"]})
    classes = {result["machine"]["class"] for result in results}
    if len(classes) != 1:
        raise SystemExit(f"{path} holds runs of {len(classes)} classes of machine: one run, one machine")
    return classes.pop(), results


def _case(question: str, test: str) -> str:
    """What tells a test from its neighbours: `test_u2a_step[70% missing]` -> "70% missing"."""
    name, _, parameters = test.removeprefix("test_").removesuffix("]").partition("[")
    said = "" if name == question else name.replace("_", " ")
    return ", ".join(part for part in (said, parameters) if part)


def lines_of(results: list[Result]) -> Iterator[dict[str, Any]]:
    """One line an arm."""
    for result in results:
        for arm, row in result.get("rows", {}).items():
            yield {
                "question": result["question"],
                "case": result["case"],
                "arm": arm,
                "dtype": result["dtype"],
                "threads": result["machine"]["threads"],
                "median_s": row["median_s"],
                "first_quartile_s": row["quartiles_s"][0],
                "third_quartile_s": row["quartiles_s"][1],
                "base": result["base"],
                "ratio": row["ratio"],
                "noise": row["noise"],
                "clear": row["clear"],
                "fraction_of_peak": row.get("fraction_of_peak"),
                **{key: _of_arm(result.get(key), arm) for key in ("flops", "bytes", "saved_bytes", "peak_bytes")},
                **{key: result.get(key) for key in ("real_rows", "rank", "missing_rate", "longest_text", "tokens")},
            }


def _of_arm(value: Any, arm: str) -> Any:
    return value.get(arm) if isinstance(value, dict) else value


def write(results: list[Result], name: str, where: Path) -> None:
    where.mkdir(exist_ok=True)
    (where / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = list(lines_of(results))
    with (where / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(results, where, name)


# ------------------------------------------------------------------------------------------------------------ a table
def print_ratios(results: list[Result], name: str) -> None:
    table = Table("question", "case", "arm", "median ms", "ratio", "A/A", "of peak", "saved MB", title=name)
    last = None
    for row in lines_of(results):
        if "A/A" in row["arm"]:
            continue
        where = row["question"], row["case"]
        first, last = where != last, where
        peak, saved = row["fraction_of_peak"], row["saved_bytes"]
        ratio = f"{row['ratio']:.2f}x" if row["clear"] or row["arm"] == row["base"] else "no result"
        table.add_row(
            *(where if first else ("", "")),
            row["arm"],
            f"{1000 * row['median_s']:.2f}",
            ratio,
            f"{row['noise']:.1%}",
            "" if peak is None else f"{peak:.2f}",
            "" if saved is None else f"{saved / 1e6:.1f}",
        )
    console().print(table)


def console() -> Console:
    """As wide as the terminal; in a pipe or a log wide enough not to break names."""
    return Console(width=None if sys.stdout.isatty() else 150)


def print_limits(results: list[Result]) -> None:
    table = Table("what", "figure", "promised", "", title="limits")
    for name, entry in limits_in(results).items():
        if entry["limit"] is not None:
            table.add_row(name, f"{entry['figure']:.3f}", entry["said"].removeprefix(", promised "), _verdict(entry))
    console().print(table)


def _verdict(entry: dict[str, Any]) -> str:
    return "[green]kept[/]" if entry["kept"] else "[red]missed[/]"


def limits_in(results: list[Result]) -> dict[str, dict[str, Any]]:
    """Every figure that was held to a limit, with the noise of its run."""
    found = {}
    for result in results:
        noise = max((row["noise"] for row in result.get("rows", {}).values()), default=None)
        found |= {name: {**entry, "noise": noise} for name, entry in result.get("limits", {}).items()}
    return found


# ------------------------------------------------------------------------------------------------------ docs/speed.md
def figures(where: Path) -> str:
    """The table of docs/speed.md: one column a class of machine that has results."""
    classes = {path.stem: limits_in(json.loads(path.read_text())) for path in sorted(where.glob("*.json"))}
    if not classes:
        raise SystemExit(f"{where} holds no results: run `make bench` first")
    lines = ["| what | " + " | ".join(classes) + " |", "|---|" + "---|" * len(classes)]
    for name, said in HEADLINES.items():
        cells = [_cell(found.get(name)) for found in classes.values()]
        if any(cells):
            lines.append(f"| {said} | " + " | ".join(cells) + " |")
    charts = [f"`benches/results/{p.name}`" for p in sorted(where.glob("*.png"))]
    return "\n".join([*lines, "", "Charts: " + ", ".join(charts) + "."])


def _cell(entry: dict[str, Any] | None) -> str:
    """A figure, the noise of its run, and the limit where it was missed."""
    if entry is None:
        return ""
    figure = f"{entry['figure']:.2f}"
    noise = "" if entry["noise"] is None else f" (noise {entry['noise']:.1%})"
    return figure + noise + ("" if entry["kept"] else f", **missed{entry['said']}**".replace("missed,", "missed:"))


def rewrite_page(where: Path, page: Path = PAGE) -> None:
    text = page.read_text()
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{page} has no block between {START!r} and {END!r}")
    page.write_text(f"{before}{START}\n{figures(where)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--readme", action="store_true", help="rewrite the figures of docs/speed.md")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where results lie")
    options = parser.parse_args()
    if options.run is None and not options.readme:
        parser.error("give a run, or --readme")
    if options.run is not None:
        name, results = read_run(options.run)
        write(results, name, options.results)
        print_ratios(results, name)
        print_limits(results)
    if options.readme:
        rewrite_page(options.results)


if __name__ == "__main__":
    main()
