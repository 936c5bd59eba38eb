"""Charts of one run, readable at a glance: ours in one colour everywhere, other arms in greys."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]

OURS = ("ours", "packed", "padded", "fusion layer", "cached", "int8_w8a8", "U2A")
BLUE, GREYS = "#1f6feb", ("#333333", "#777777", "#aaaaaa", "#cc8844", "#cccccc", "#996633")
FLOORS = ("gemm",)


def is_ours(arm: str) -> bool:
    return arm.startswith(OURS)


def arms_of(result: Result) -> list[str]:
    """The arms that a chart shows: not the second of two equal ones."""
    return [arm for arm in result["rows"] if "A/A" not in arm and arm not in FLOORS]


def title_of(result: Result) -> str:
    return f"{result['question']} {result['case']}".strip()


def bars(ax: Any, values: dict[str, float], title: str, unit: str) -> None:
    """One horizontal bar an arm, its value beside it."""
    colours = [BLUE if is_ours(name) else GREYS[2] for name in values]
    drawn = ax.barh(list(values), list(values.values()), color=colours)
    ax.bar_label(drawn, fmt=f" %.3g{unit}", fontsize=8)
    ax.invert_yaxis()
    ax.set_title(title, fontsize=9, loc="left")
    ax.margins(x=0.18)
    ax.tick_params(labelsize=8)
    ax.set_xticks([])
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def lines(ax: Any, series: dict[str, list[tuple[float, float]]], x: str, y: str, title: str) -> None:
    """One line an arm over x, from 0 up so that heights compare."""
    greys = iter(GREYS * 3)
    for name, points in series.items():
        ours = is_ours(name)
        colour, width = (BLUE, 2.5) if ours else (next(greys), 1.2)
        ax.plot(*zip(*sorted(points), strict=True), "o-", color=colour, linewidth=width, markersize=4, label=name)
    ax.set(xlabel=x, ylabel=y, ylim=(0, None))
    ax.set_title(title, fontsize=9, loc="left")
    if len(series) > 1:
        ax.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def grid(panels: list[Callable[[Any], None]], columns: int, height: float, title: str, path: Path) -> None:
    rows = -(-len(panels) // columns)
    size = (4.6 * columns, height * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax, panel in zip(axes.flat, panels, strict=False):
        panel(ax)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------- what they show
def steps_of(results: Iterable[Result]) -> list[Result]:
    """Whole steps and blocks: what one bar an arm can show."""
    shown = ("u2a_step", "pmf_step", "joint_embedding_step", "block", "cache", "int8")
    return [r for r in results if r["question"] in shown and "rows" in r and "points" not in r]


def time_panels(results: list[Result]) -> list[Callable[[Any], None]]:
    def panel(result: Result) -> Callable[[Any], None]:
        seconds = {arm: 1000 * result["rows"][arm]["median_s"] for arm in arms_of(result)}
        return lambda ax: bars(ax, seconds, title_of(result), " ms")

    return [panel(result) for result in steps_of(results)]


def memory_panels(results: list[Result]) -> list[Callable[[Any], None]]:
    def panel(result: Result) -> Callable[[Any], None]:
        megabytes = {arm: count / 1e6 for arm, count in result["saved_bytes"].items()}
        return lambda ax: bars(ax, megabytes, title_of(result), " MB")

    return [panel(r) for r in results if "saved_bytes" in r and r["question"] not in ("attention", "assemble")]


def peak_panels(results: list[Result]) -> list[Callable[[Any], None]]:
    def panel(result: Result) -> Callable[[Any], None]:
        fractions = {arm: result["rows"][arm]["fraction_of_peak"] for arm in arms_of(result)}
        return lambda ax: bars(ax, fractions, title_of(result), "")

    return [panel(result) for result in steps_of(results) if "useful_flops" in result]


def rank_panels(results: list[Result]) -> list[Callable[[Any], None]]:
    linears = [r for r in results if r["question"] == "lora_linear" and "rank" in r]

    def panel(shape: str) -> Callable[[Any], None]:
        series: dict[str, list[tuple[float, float]]] = {}
        for result in (r for r in linears if r["shape"] == shape):
            for arm in arms_of(result):
                series.setdefault(arm, []).append((result["rank"], result["rows"][arm]["ratio"]))
        return lambda ax: lines(ax, series, "rank", "time over the frozen linear", shape)

    return [panel(shape) for shape in dict.fromkeys(r["shape"] for r in linears)]


def token_panels(results: list[Result]) -> list[Callable[[Any], None]]:
    found = [r for r in results if r["question"] == "attention" and "tokens" in r]

    def panel(dtype: str) -> Callable[[Any], None]:
        series: dict[str, list[tuple[float, float]]] = {}
        for result in (r for r in found if r["dtype"] == dtype):
            for arm in arms_of(result):
                series.setdefault(arm, []).append((result["tokens"], 1000 * result["rows"][arm]["median_s"]))
        return lambda ax: lines(ax, series, "tokens a sample", "ms", f"attention, {dtype}")

    return [panel(dtype) for dtype in dict.fromkeys(r["dtype"] for r in found)]


def growth_panels(results: list[Result]) -> list[Callable[[Any], None]]:
    """Seconds of one step against real rows, missing rate and length of the texts."""
    found = next((r for r in results if "points" in r), None)
    if found is None:
        return []
    points = {name: {**place, "ms": 1000 * found["rows"][name]["median_s"]} for name, place in found["points"].items()}
    by_rate = [(p["missing_rate"], p["ms"]) for name, p in points.items() if "missing" in name]
    complete = [(p["longest_text"], p["ms"]) for p in points.values() if p["missing_rate"] == 0]
    by_rows = [(p["real_rows"], p["ms"]) for p in points.values()]
    fit, ends = found["fit"], (0, max(rows for rows, _ in by_rows))
    line = [(rows, 1000 * (fit["seconds"] + fit["seconds_per_row"] * rows)) for rows in ends]
    title = f"worst deviation from the line {fit['worst']:.1%}"

    def rows_panel(ax: Any) -> None:
        ax.plot(*zip(*by_rows, strict=True), "o", color=BLUE)
        lines(ax, {"line through them": line}, "real rows", "ms a step", title)

    return [
        rows_panel,
        lambda ax: lines(
            ax, {"ours": by_rate}, "share of samples with one modality missing", "ms a step", "texts of 8 to 128 tokens"
        ),
        lambda ax: lines(ax, {"ours": complete}, "longest text, tokens", "ms a step", "all present"),
    ]


CHARTS = {  # name: (panels, columns, height of a row, what it shows)
    "time": (time_panels, 3, 2.0, "time of a step"),
    "memory": (memory_panels, 3, 1.8, "bytes kept for backward"),
    "peak": (peak_panels, 3, 2.0, "useful operations, as a fraction of the rate of a product in the same run"),
    "rank": (rank_panels, 3, 3.2, "a linear with LoRA over the frozen one, forward and backward"),
    "tokens": (token_panels, 2, 3.2, "attention, forward and backward"),
    "rows": (growth_panels, 3, 3.2, "a U2A step, ours"),
}


def draw(results: list[Result], where: Path, name: str) -> list[Path]:
    """One PNG for every chart that the results have data for: `<name>-<chart>.png`."""
    paths = []
    for chart, (panels_of, columns, height, title) in CHARTS.items():
        panels = panels_of(results)
        if panels:
            paths.append(where / f"{name}-{chart}.png")
            grid(panels, min(columns, len(panels)), height, f"{title} ({name})", paths[-1])
    return paths
