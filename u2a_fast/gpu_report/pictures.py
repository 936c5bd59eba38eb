"""Bars of a step's milliseconds, and of the fractions that products and passes reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .timing import CONTROL

Results = dict[str, dict[str, Any]]


def draw_steps(results: Results, path: Path) -> bool:
    """Wall milliseconds of every arm of (i); False where there are none."""
    entries = results.get("i", {}).get("entries", {})
    groups: dict[str, dict[str, float]] = {}
    for name, entry in entries.items():
        if "wall" in entry:
            of = groups.setdefault(name.split(":")[0], {})
            for arm, taken in entry["wall"]["ms"].items():
                of.setdefault(arm, taken)
    return _bars(groups, "wall ms of a step", path)


def draw_fractions(results: Results, path: Path) -> bool:
    """Products as fractions of the library's rate, passes of a copy's."""
    groups: dict[str, dict[str, float]] = {}
    for name, entry in results.get("g", {}).get("entries", {}).items():
        for arm, fraction in entry.get("fraction", {}).items():
            if not arm.endswith(CONTROL) and arm not in ("library", "dX library"):
                groups.setdefault(f"{arm}, of the library's rate", {})[name] = fraction
    for name, entry in results.get("h", {}).get("entries", {}).items():
        if entry.get("of_copy"):
            groups.setdefault("passes, of a copy's bandwidth", {})[name] = entry["of_copy"]
    return _bars(groups, "", path, reference=1.0)


def _bars(groups: dict[str, dict[str, float]], label: str, path: Path, reference: float | None = None) -> bool:
    """A row of horizontal bars for every group, one under the other."""
    path.unlink(missing_ok=True)
    if not groups:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [0.6 + 0.25 * len(bars) for bars in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups), 1, squeeze=False, figsize=(9, sum(heights) + 0.5), height_ratios=heights, layout="constrained"
    )
    for axis, (title, bars) in zip(axes[:, 0], groups.items(), strict=True):
        axis.barh(list(bars), list(bars.values()), color="tab:blue")
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_xlabel(label, fontsize=8)
        if reference is not None:
            axis.axvline(reference, color="black", linewidth=0.8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
