"""All methods side by side: what is finished is not run again, and what was run otherwise is refused."""

import csv
import json
import re

import pytest
import tiny_data

from u2a_fast import comparison
from u2a_fast.cli import main


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    table = tiny_data.write_table(root / "data", 60)
    given = ["--data", str(table), "--encoders", json.dumps(tiny_data.encoder_folders(root)), "--max-steps", "2"]
    return ["compare", *given, "--seeds", "[0, 1]", "--output-dir", str(root / "out"), "--baselines"], root


@pytest.mark.slow
def test_a_comparison_is_resumed_and_only_with_the_same_options(arguments, monkeypatch):
    arguments, root = arguments
    main([*arguments, "--methods", '["u2a", "pmf"]'])
    table = (root / "out" / "comparison.md").read_text(encoding="utf-8")
    tables = [line for line in table.splitlines() if line.startswith("| scenario |")]
    assert tables == [
        "| scenario | u2a | pmf | late fusion | best, and level with it |",
        "| scenario | u2a | pmf |",
        "| scenario | u2a | pmf | late fusion |",
    ]
    assert len(re.findall(r"\| \*{0,2}[+-]\d\.\d{3}\*{0,2} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", table)) == 7 * 5
    assert (root / "out" / "curves.png").stat().st_size and (root / "out" / "pmf-seed1" / "curves.png").exists()
    with open(root / "out" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == {"u2a", "pmf", "late fusion", "unimodal"}
    assert all(row["seeds"] == "2" and 0 <= float(row["mean_accuracy"]) <= 1 for row in rows)

    def not_again(*_):
        raise AssertionError("it was finished")

    monkeypatch.setattr(comparison, "run_once", not_again)
    monkeypatch.setattr(comparison, "BASELINES", dict.fromkeys(comparison.BASELINES, not_again))
    main([*arguments, "--methods", '["u2a", "pmf"]'])
    assert (root / "out" / "comparison.md").read_text(encoding="utf-8") == table
    for changed in (["--learning-rate", "1.0"], ["--quantization", "int8"], ["--missing-rate", "0.1"]):
        with pytest.raises(SystemExit, match="holds another run"):
            main([*arguments, "--methods", '["u2a"]', *changed])


def test_an_unknown_method_is_named_before_anything_runs(arguments):
    arguments, root = arguments
    with pytest.raises(SystemExit, match=r"methods must be one of .*u2a.* not 'magic'"):
        main([*arguments[:-3], "--output-dir", str(root / "other"), "--methods", '["u2a", "magic"]'])
    assert not (root / "other").exists()
