"""What `summary.py` makes of a run: plumbing only, nothing is timed.

pytest benches/test_summary.py --benchmark-only
"""

import json

import pytest
import summary
from arms import machine


def a_row(seconds, ratio):
    quartiles = [seconds, seconds]
    return {"median_s": seconds, "quartiles_s": quartiles, "ratio": ratio, "clear": True, "noise": 0.01}


def a_run(folder):
    """As pytest-benchmark writes it: one bench that kept its limit, one that missed it, and a check."""
    rows = {"packed": a_row(1.0, 1.0), "packed (A/A)": a_row(1.0, 1.0), "peft fp32 sdpa": a_row(2.0, 2.0)}
    name = "u2a_step emoji: gain over the best PEFT arm"
    missed = {"figure": 1.5, "limit": 1.9, "kept": False, "said": ", promised at least 1.9"}
    kept = {"figure": 5.0, "limit": 4.0, "kept": True, "said": ", promised at least 4.0"}
    common = {"rows": rows, "base": "packed", "dtype": "fp32", "machine": machine(), "saved_bytes": {"packed": 1e6}}
    benches = [
        ("test_u2a_step.py::test_emoji", {**common, "limits": {name: missed}}),
        ("test_cache.py::test_cached_epoch", {**common, "limits": {"cache: gain of a cached epoch": kept}}),
        ("test_u2a_step.py::test_check", {}),
    ]
    path = folder / "run.json"
    found = [{"fullname": f"benches/{name}", "extra_info": info} for name, info in benches]
    path.write_text(json.dumps({"benchmarks": found}))
    return path


def test_summary_smoke(benchmark, tmp_path):
    name, results = summary.read_run(a_run(tmp_path))
    benchmark.pedantic(summary.write, args=(results, name, tmp_path / "results"), rounds=1)
    summary.print_ratios(results, name)
    summary.print_limits(results)
    assert [(r["question"], r["case"]) for r in results] == [("u2a_step", "emoji"), ("cache", "cached epoch")]
    made = {path.name.removeprefix(name) for path in (tmp_path / "results").iterdir()}
    assert {".json", ".csv", "-time.png", "-memory.png"} <= made


def test_page_smoke(benchmark, tmp_path):
    name, results = summary.read_run(a_run(tmp_path))
    summary.write(results, name, tmp_path / "results")
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{summary.START}\nold\n{summary.END}\nafter\n")
    benchmark.pedantic(summary.rewrite_page, args=(tmp_path / "results", page), rounds=1)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "1.50 (noise 1.0%), **missed: promised at least 1.9**" in text and "5.00 (noise 1.0%) |" in text
    page.write_text("no block")
    with pytest.raises(SystemExit, match="has no block"):
        summary.rewrite_page(tmp_path / "results", page)
