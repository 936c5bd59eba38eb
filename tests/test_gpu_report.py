"""The GPU report without a GPU: that its script runs, keeps what was measured, and fails where a result is wrong."""

import json
import subprocess
import sys
import time

import forks
import pytest
import torch
from dry_driver import dry
from torch.utils._python_dispatch import TorchDispatchMode

from u2a_fast import doctor, kernels
from u2a_fast.gpu_report import __main__ as script
from u2a_fast.gpu_report import child, correctness, modern_step, sanitizer, timing
from u2a_fast.gpu_report.cases import Draw
from u2a_fast.gpu_report.cases_modern import CASES
from u2a_fast.gpu_report.report import NoResult, Report
from u2a_fast.gpu_report.steps import STEPS
from u2a_fast.kernels.compile_budgets import FLOPS

FOREVER = 1e9


@pytest.fixture
def in_forks(monkeypatch):
    """Steps in forks of this process, but the first, which starts as on a GPU: imports take longer than what is run."""
    start = script.run_job

    def run_job(job, deadline, folder, dry, threads):
        if job.step == "a":
            return start(job, deadline, folder, dry, threads)
        command = script.command_of(job, folder, deadline - time.monotonic(), dry)
        given = command[command.index(job.step) : -1]
        ended = forks.finish(forks.start(lambda: child.run(*given), folder / "logs" / f"{job.step}.txt"), FOREVER)
        return ("failed" if ended else "done"), 0.0

    monkeypatch.setattr(script, "run_job", run_job)
    monkeypatch.setattr(script, "AT_ONCE_DRY", 1)


@pytest.mark.slow
def test_a_dry_run_gives_every_step_and_the_page(in_forks, tmp_path):
    status = script.main(["--dry", "--out", str(tmp_path)])
    assert status == 0, "\n".join(path.read_text()[-1000:] for path in (tmp_path / "logs").glob("*"))
    for name in STEPS:
        step = json.loads((tmp_path / f"{name}.json").read_text())
        states = {entry["state"] for entry in step["entries"].values()}
        assert step["status"] == "done" and states and states <= {"done", "no result"}, (name, step)
    page = (tmp_path / "README.md").read_text()
    assert all(f"({name}) {step.title}" in page for name, step in STEPS.items())
    assert (tmp_path / "steps.png").exists() and (tmp_path / "fractions.png").exists()


@pytest.fixture
def in_this_process(monkeypatch):
    """Step (c), of LayerNorm alone, without a process of its own."""

    def run_job(job, deadline, folder, dry, threads):
        correctness.measure(Report(job.file(folder), dry, deadline))
        return "done", 0.0

    monkeypatch.setattr(script, "run_job", run_job)
    monkeypatch.setattr(correctness, "CASES", [c for c in correctness.CASES if c.function == "layer_norm"])


@pytest.mark.parametrize("factor, status", [(1.0, 0), (1.05, 1)])
def test_a_wrong_result_fails_the_report(factor, status, in_this_process, monkeypatch, tmp_path):
    right = kernels.layer_norm
    plant = lambda *given: right(*given) * (1.0 if kernels.get_backend() == "reference" else factor)  # noqa: E731
    monkeypatch.setattr(kernels, "layer_norm", plant)
    assert script.main(["--dry", "--steps", "c", "--out", str(tmp_path)]) == status
    assert ("WRONG" in (tmp_path / "README.md").read_text()) == bool(status)


def report(path, seconds=FOREVER):
    return Report(path, True, time.monotonic() + seconds)


def test_a_failing_measurement_loses_no_other(tmp_path):
    path = tmp_path / "x.json"
    first = report(path)
    first.measure("before", lambda: {"value": 1})
    first.measure("fails", lambda: 1 / 0)
    first.measure("after", lambda: {"value": 2})
    entries = json.loads(path.read_text())
    assert [entries[name]["state"] for name in ("before", "fails", "after")] == ["done", "error", "done"]
    assert "ZeroDivisionError" in entries["fails"]["error"]


def test_a_process_that_dies_is_continued_behind_what_it_died_of(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"before": {"state": "done", "value": 1}, "kills": {"state": "running"}}))
    again = report(path)
    assert again.measure("before", lambda: {"value": 2})["value"] == 1
    assert again.measure("kills", lambda: {"value": 3}) == {"state": "error", "error": "the process died here"}
    assert again.measure("after", lambda: {"value": 4})["state"] == "done"


def test_what_there_was_no_time_for_is_no_result(tmp_path):
    assert report(tmp_path / "x.json", 0).measure("late", lambda: {})["state"] == "no result"
    stopped = tmp_path / "y.json"
    stopped.write_text(json.dumps({"under way": {"state": "running"}}))
    assert script.entries_of(stopped)["under way"]["state"] == "no result"


@pytest.mark.slow
def test_a_process_is_ended_when_its_time_is_over(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "command_of", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    start = time.monotonic()
    status, _ = script.run_job(script.Job("a", 0), start + 1, tmp_path, True, 1)
    assert status == "over its time" and time.monotonic() - start < 20


def test_a_difference_within_the_noise_is_no_result():
    arms = {"base": [1.0, 1.1, 1.2], "base (A/A)": [1.2, 1.3, 1.2], "other": [1.15, 1.15, 1.15]}
    found = timing.summary(arms, "base")
    assert found["noise"] > 0.05
    assert timing.said(found["us"]["other"] / found["us"]["base"], found["noise"]).startswith("no result")
    assert timing.said(2.0, found["noise"]) == "2.00"


def test_doctor_runs_step_c_and_passes_its_verdict_on(monkeypatch, capsys):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert not doctor.prove_kernels()
    assert "--dry" in asked[0] and asked[0][asked[0].index("--steps") + 1] == "c"
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_every_kernel_has_a_case_and_every_function_one_for_the_sanitizer():
    with dry("sm_90", compiles=False) as device:
        for case in CASES:
            operands = case.make(Draw(torch.bfloat16))
            leaves = {name: operands[name].requires_grad_() for name in case.trained if operands.get(name) is not None}
            correctness.gradients({n: t for n, t in case.call(operands).items() if t is not None}, leaves)
    assert set(device.launches) == set(FLOPS)
    functions = {case.function for case in CASES} - set(sanitizer.PLAIN)
    assert functions == {case.function for case in CASES if "odd" in case.name} - set(sanitizer.PLAIN)


def test_without_peft_there_is_no_result(monkeypatch):
    model, _ = modern_step.TINY_CASES["qwen3"]()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(NoResult, match="peft is not installed"):
        modern_step.PeftClassifier(model)


def test_peft_reads_its_rows_by_an_index_that_lies_beside_them():
    """One on the CPU would stop a GPU's step."""

    class Beside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.index.Tensor:
                assert all(index.device == args[0].device for index in args[1] if index is not None)
            return func(*args, **(kwargs or {}))

    model, batch = modern_step.TINY_CASES["qwen3"]()
    arm = modern_step.PeftClassifier(model)
    with torch.device("meta"), Beside():  # there a tensor lies of which nobody says where
        assert arm(**batch).isfinite()
