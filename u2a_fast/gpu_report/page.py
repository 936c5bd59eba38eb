"""The page: verdicts as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_page(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """`README.md` in the folder."""
    lines = ["# GPU report", ""]
    for name, step in results.items():
        lines += [f"## ({name}) {step['title']}: {step['status']}, {step['seconds']} s", ""]
        for what, entry in step["entries"].items():
            lines.append(f"- {what}: {entry['state']}")
        lines.append("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join(lines))
