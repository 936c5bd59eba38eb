"""All methods side by side: what is finished is not run again, and what was run otherwise is refused."""

import csv
import json
import re

import pytest
import tiny_data

from u2a_fast import comparison
from u2a_fast.cli import main

NAN = float("nan")


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


@pytest.mark.parametrize(
    ("scores", "cell"),
    [
        ([0.2, 0.4], (0.3, 0.1 * 2**0.5)),
        ([NAN, 0.4], (0.4, NAN)),
        ([0.4, NAN, 0.2], (0.3, 0.1 * 2**0.5)),
        ([NAN] * 2, (NAN,) * 2),
    ],
)
def test_seeds_in_which_no_sample_counts_say_nothing(scores, cell):
    reports = [[{"scenario": "text missing", "accuracy": score, "n": 0}] for score in scores]
    assert comparison._cells(reports)["text missing"] == pytest.approx(cell, nan_ok=True)


def test_an_unknown_method_is_named_before_anything_runs(arguments):
    arguments, root = arguments
    with pytest.raises(SystemExit, match=r"methods must be one of .*u2a.* not 'magic'"):
        main([*arguments[:-3], "--output-dir", str(root / "other"), "--methods", '["u2a", "magic"]'])
    assert not (root / "other").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "pmf"], "compare takes --methods and --seeds, and goes on by itself: leave --method out"),
        (["--seed", "3"], "leave --seed out"),
        (["--resume"], "leave --resume out"),
        (["--seeds", "[0, 0]"], "--seeds has 0 twice, which would count one run as two: name it once"),
        (["--methods", '["pmf", "pmf"]'], "--methods has 'pmf' twice"),
    ],
)
def test_what_a_comparison_sets_itself_is_refused(more, message, arguments):
    with pytest.raises(SystemExit, match=message):
        main([*arguments[0], *more])


@pytest.fixture
def started(monkeypatch):
    """The runs that a comparison starts, none of which trains."""
    started = []

    def run(one, *_):
        started.append(one.output_dir)
        raise AssertionError("it was started")

    monkeypatch.setattr(comparison, "run_once", run)
    return started


@pytest.mark.slow
def test_every_folder_split_and_method_is_looked_at_before_the_first_run(arguments, started, tmp_path, monkeypatch):
    given = [*arguments[0][:-3], "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match='all_absent must be "error", since nothing present gives no logits'):
        main([*given, "--methods", '["u2a", "pmf"]', "--all-absent", "prior"])
    load_sources = comparison.load_sources

    def one_class_by_seed_1(one):
        splits, sources = load_sources(one)
        train = splits["train"].filter(lambda row: one.seed == 0 or row["label"] == 0)
        return {**splits, "train": train}, sources

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "load_sources", one_class_by_seed_1)
        with pytest.raises(SystemExit, match="has one class only"):
            main([*given, "--methods", '["u2a"]'])
    (tmp_path / "pmf-seed1").mkdir()
    (tmp_path / "pmf-seed1" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="pmf-seed1 holds another model"):
        main([*given, "--methods", '["u2a", "pmf"]'])
    assert started == []


def test_a_baseline_that_is_a_chosen_method_runs_once(arguments, monkeypatch):
    class Asked(Exception):
        """What would run."""

    def asked(due):
        raise Asked(*due)

    monkeypatch.setattr(comparison, "_check", asked)
    with pytest.raises(Asked) as caught:
        main([*arguments[0], "--methods", '["late_fusion"]'])
    assert caught.value.args == tuple((name, seed) for seed in (0, 1) for name in ("late_fusion", "unimodal"))


@pytest.mark.slow
def test_a_modality_that_nobody_can_learn_from_alone_is_left_out(arguments, tmp_path, monkeypatch):
    load_sources = comparison.load_sources

    def complete(one):
        splits, sources = load_sources(one)
        return {k: part.filter(lambda row: row["text"] and row["image"]) for k, part in splits.items()}, sources

    monkeypatch.setattr(comparison, "load_sources", complete)
    given = [*arguments[0][:-4], "[0]", "--output-dir", str(tmp_path), "--baselines", "--methods", '["u2a"]']
    main([*given, "--missing-kind", "image", "--missing-rate", "1"])
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "Unimodal models trained on what remains: text only" in text and "image only" not in text
