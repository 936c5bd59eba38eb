"""A method wins where it is ahead of the others by more than the noise of test samples and seeds."""

import numpy as np
import pytest

from u2a_fast.reports import plot_curves
from u2a_fast.verdicts import Verdicts, markdown

SCENARIOS = ("full", "image missing", "text missing")


def tallies(right, n=200, seeds=3):
    """Of n samples the first `right` are right, with a few others for each seed."""
    found = []
    for seed in range(seeds):
        rows = np.zeros((n, 1))
        rows[: right + seed] = 1
        found.append(np.roll(rows, seed, axis=0))
    return found


def verdicts(right, single=None):
    """From `{method: right answers by scenario}` and `{"image only": right answers}`."""
    by_sample = {name: dict(zip(SCENARIOS, map(tallies, counts), strict=True)) for name, counts in right.items()}
    by_sample |= {name: {"full": tallies(count)} for name, count in (single or {}).items()}
    table = {name: {s: (np.mean(by_sample[name][s]), 0.0) for s in SCENARIOS} for name in right}
    if single:
        table["unimodal"] = {name: (np.mean(by_sample[name]["full"]), 0.0) for name in single}
    return Verdicts(table, by_sample, "accuracy")


def test_a_lead_within_the_noise_is_level():
    found = verdicts({"a": (150, 150, 150), "b": (120, 149, 170)})
    assert [found.best(scenario) for scenario in SCENARIOS] == [["a"], ["a", "b"], ["b"]]


@pytest.mark.parametrize(("scenario", "rival"), [("full", 140), ("image missing", 140), ("text missing", 90)])
def test_the_unimodal_model_to_beat_is_the_best_that_is_left(scenario, rival):
    found = verdicts({"a": (150, 150, 150)}, {"image only": 90, "text only": 140})
    mean, low, high = found.over("a", None, scenario)
    assert mean == pytest.approx((150 - rival) / 200) and low <= mean <= high


def test_there_is_no_difference_where_nobody_learnt_from_what_is_left():
    found = verdicts({"a": (150, 150, 150)}, {"text only": 140})
    assert found.over("a", None, "full")[0] == pytest.approx(10 / 200)
    assert np.isnan(found.over("a", None, "text missing")).all() and "text only" in markdown(found)


@pytest.mark.slow
def test_where_no_sample_counts_nobody_is_best_or_to_be_beaten():
    found = verdicts({"a": (150, 150, 150), "b": (120, 149, 170)}, {"image only": 90, "text only": 140})
    for name in found.methods:
        found.table[name]["text missing"] = np.nan, np.nan
    found.single["image only"] = np.nan
    assert found.best("text missing") == []
    assert found.over("a", None, "full")[0] == pytest.approx(10 / 200)
    assert np.isnan(found.over("a", None, "text missing")).all()
    assert "nan" not in markdown(found) and markdown(found).count("| - |") == 2


@pytest.mark.slow
def test_the_tables_have_a_column_for_each_method_but_the_rival():
    right = {"a": (150, 150, 150), "late fusion": (120, 149, 170)}
    text = markdown(verdicts(right, {"image only": 90, "text only": 140}))
    first, against_late, against_single = (part.splitlines() for part in text.split("| scenario |")[1:])
    assert first[0] == " a | late fusion | best, and level with it |"
    assert first[2] == "| full | 0.755 ± 0.000 | 0.605 ± 0.000 | a |"
    assert against_late[0] == " a |" and against_late[2].startswith("| full | **+0.150** (+0.")
    assert against_late[4].startswith("| text missing | **-0.100** (-0.")
    assert against_single[0] == " a | late fusion |" and "| image missing | **+0.050** (" in against_single[3]
    assert "image only 0.455 ± 0.000, text only 0.705 ± 0.000" in text


def test_one_seed_has_no_spread():
    found = verdicts({"a": (150, 150, 150)}, {"image only": 90})
    found.table = {
        name: {scenario: (mean, np.nan) for scenario, (mean, _) in cells.items()} for name, cells in found.table.items()
    }
    text = markdown(found)
    assert "| full | 0.755 | a |" in text and "image only 0.455." in text and "nan" not in text.split("Difference")[0]


def test_a_method_alone_has_nothing_to_be_compared_with():
    assert markdown(verdicts({"late_fusion": (150, 150, 150)})).count("| scenario |") == 1


def test_curves_have_a_colour_for_each_model_and_a_line_for_each_seed():
    log = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "eval_accuracy": 0.4}, {"epoch": 1.0, "loss": 1.0}]
    loss, watched = plot_curves({"a": [log, log], "b": [log]}).axes
    assert (loss.get_ylabel(), watched.get_ylabel()) == ("training loss", "validation accuracy")
    assert [list(line.get_xydata().ravel()) for line in loss.lines] == [[0.5, 2, 1, 1]] * 3
    assert [list(line.get_xydata().ravel()) for line in watched.lines] == [[1, 0.4]] * 3
    assert len({line.get_color() for line in loss.lines}) == 2
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "b"]


def test_a_run_too_short_for_a_log_has_empty_curves():
    (axes,) = plot_curves({"": [[]]}).axes
    assert all(len(line.get_xdata()) == 0 for line in axes.lines) and axes.get_legend() is None
