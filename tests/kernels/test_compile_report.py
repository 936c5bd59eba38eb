"""The compile report: what it lists, that every budget is kept, and that a broken one is named."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from dry_driver import SHARED

from u2a_fast.kernels import compile_budgets, compile_cases, compile_report
from u2a_fast.kernels.linear_lowrank import linear_lowrank_triton

COLUMNS = {"kernel", "target", "regs", "spills", "shared_bytes", "mma", "vec16_loads", "occupancy", "bytes", "flops"}
FUNCTIONS = {"lora_linear", "linear_lowrank", "quantize_rows", "assemble_norm_project", "substitute", "attention"}
FUNCTIONS |= {"rotary", "gated"}
HERE_AND_THERE = {"lora_linear_backward_input", "attention_small_query_forward", "attention_small_query_backward"}


@functools.cache
def rows():
    return compile_report.report()


@pytest.mark.slow
def test_every_target_has_every_product_in_one_half_precision_and_over_int8_and_each_kernel_is_compiled():
    assert all(row.keys() >= COLUMNS | {"computed_us"} for row in rows())
    assert {row["function"] for row in rows()} == FUNCTIONS
    assert all(row["kernel"].startswith(row["function"]) for row in rows())
    assert {row["kernel"].split(".")[-1] for row in rows()} == compile_budgets.FLOPS.keys()
    assert {row["target"] for row in rows()} == compile_report.DEVICES.keys() == SHARED.keys()
    for target in SHARED:
        own = [row for row in rows() if row["target"] == target]
        assert {row["kernel"].split(".")[-1] for row in own} >= compile_budgets.MATRIX_UNITS - HERE_AND_THERE
        plain = {(row["variant"], row["rank"]) for row in own if row["variant"] in ("bf16", "fp16")}
        assert plain == {("fp16", 64) if target in ("sm_86", "sm_89", "sm_120", "gfx90a") else ("bf16", 8)}
        assert any(row["variant"] == "int8 x int8" for row in own)
        assert {row["shape"] for row in own} == {shape.model for shape in compile_cases.SHAPES}


@pytest.mark.slow
def test_one_card_runs_what_was_compiled_for_another_with_the_same_instructions():
    assert compiled(4096, 768, 768, "sm_89") == compiled(4096, 768, 768, "sm_86")
    ours = [row for row in rows() if row["target"] == "sm_89"]
    theirs = [row for row in rows() if row["target"] == "sm_86"]
    assert [row["regs"] for row in ours] == [row["regs"] for row in theirs]
    assert ours[0]["computed_us"] < theirs[0]["computed_us"]


@pytest.mark.slow
def test_every_budget_is_kept():
    assert compile_report.broken_budgets(rows()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, message",
    [
        ({"spills": 4}, "4 bytes of registers spill"),
        ({"mma": 0}, "no matrix instruction"),
        ({"loop_loads16": 0}, "no 16-byte load in the K loop"),
        ({"occupancy": 1}, "1 block per multiprocessor"),
        ({"occupancy": 0, "shared_bytes": 300000}, "300000 bytes of shared memory fit on no multiprocessor"),
        ({"computed_us": 70.0}, "forward of LayerNorm and q, k, v: computed"),
    ],
)
def test_a_broken_budget_is_named(fault, message):
    gemm = {"kernel": "linear_lowrank_forward", "variant": "bf16", "rank": 8, "target": "sm_90", "shape": "ViT-B"}
    worse = [row | fault if gemm.items() <= row.items() else row for row in rows()]
    assert any(message in sentence for sentence in compile_report.broken_budgets(worse))


@pytest.mark.parametrize("rank, spills, named", [(64, 16, False), (64, 24, True), (8, 16, True)])
def test_a_few_bytes_may_spill_at_the_highest_rank(rank, spills, named):
    row = {"kernel": "lora_linear_project", "variant": "fp16", "rank": rank, "target": "sm_120", "spills": spills}
    row |= {"shared_bytes": 0, "occupancy": 1, "mma": 1, "vec16_loads": 1}
    assert bool(compile_report._faults(row)) == named


def test_moving_more_bytes_than_needed_is_named(monkeypatch):
    case = compile_cases.Case(
        *("f", "forward", "bf16", compile_cases.linear_lowrank_forward), minimum_bytes=lambda shape, rank: 1000
    )
    monkeypatch.setattr(compile_report, "CASES", [case])
    broken = compile_report._bytes_over()
    assert len(broken) == 3 and "times the 1000 bytes it must" in broken[0]


def compiled(m, k, n, target="sm_90"):
    meta = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    (launch,) = compile_report.record(
        lambda: linear_lowrank_triton(
            meta(m, k), meta(n, k), None, meta(m, 16), meta(n, 16), 1.0, None, 1, 1, False, None, None
        )
    )
    return compile_report.compile_launch(launch, target)


@pytest.mark.slow
def test_a_width_that_is_no_multiple_of_16_bytes_loses_its_wide_loads():
    """The check on loads can fail: rows of 769 elements cannot be read 16 bytes at a time."""
    assert compiled(4096, 768, 768)["loop_loads16"] > 0
    assert compiled(4096, 769, 768)["loop_loads16"] == 0


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed():
    program = (
        "import time; from u2a_fast.kernels import compile_report as report\n"
        "report.compile_launch = lambda *job: time.sleep(600)\n"
        "report._compile_all([(None, 'sm_80')] * 2, processes=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    workers = eventually(lambda: len(found := children.read_text().split()) == 2 and found)
    parent.kill()
    parent.wait()
    eventually(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def eventually(condition, seconds=60):
    """What `condition` returns once it is true."""
    for _ in range(10 * seconds):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError(f"still not so after {seconds} seconds")


@pytest.mark.slow
def test_another_process_finds_what_was_compiled(tmp_path):
    """Names are hashed differently in every process; the compiler's key must not depend on it."""
    program = (
        "from u2a_fast.kernels import compile_cases as cases, compile_report as report\n"
        "launches = report.record(lambda: cases.substitute_backward(cases.VIT_B, 8))\n"
        "report.compile_launch(*launches, 'sm_80')"
    )
    for hash_seed in "12":
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert len([*tmp_path.glob("*/*.cubin")]) == 1


def test_a_launch_is_counted_from_its_tensors_and_sizes():
    shape = compile_cases.VIT_B
    (launch,) = compile_report.record(lambda: compile_cases.linear_lowrank_forward(shape, 16))
    m, k, n = 64 * 197, 768, 3 * 768
    assert launch.bytes == 2 * (m * k + n * k + n + m * n + m * 3 * 16) + 4 * n * 16
    assert launch.flops == 2 * m * n * (k + 16)
    assert compile_cases.frozen_linear(shape) == (2 * (m * k + n * k + n + m * n), 2 * m * n * k)
    assert compile_report.computed_us(launch, "sm_90") == pytest.approx(1e6 * launch.flops / 989e12)
    (copy,) = compile_report.record(lambda: compile_cases.quantize_rows(shape, 8))
    assert compile_report.computed_us(copy, "sm_80") == pytest.approx(1e6 * (3 * m * k + 4 * m) / 2.04e12)


def test_a_size_that_triton_is_told_not_to_specialise_is_not_taken_for_a_multiple_of_16(monkeypatch):
    @triton.jit(do_not_specialize=["M"])
    def plain(X, M, K, BM: tl.constexpr):
        pass

    monkeypatch.setitem(compile_report.FLOPS, "plain", lambda a: 0)
    (launch,) = compile_report.record(
        lambda: compile_report.backend.launch(plain, (1,), X=torch.ones(16, device="meta"), M=32, K=32, BM=16)
    )
    assert launch.divisible == {"X", "K"} and launch.constants == (("BM", 16),)


@pytest.mark.parametrize(
    "target, regs, shared, warps, blocks",
    [
        ("sm_90", 128, 98304, 8, 2),  # 65536 registers / (128 * 256 threads)
        ("sm_90", 129, 98304, 8, 1),  # registers are handed out by eights
        ("sm_90", 32, 116000, 8, 1),  # 228 KB hold one block of 113 KB and the system's 1 KB, and not two
        ("sm_80", 32, 0, 4, 16),  # 64 warps
        ("sm_80", 32, 170000, 4, 0),  # a block may ask for 163 KB
        ("sm_90", 255, 0, 4, 2),
        ("sm_86", 32, 0, 4, 12),  # 48 warps
        ("sm_86", 32, 50176, 4, 2),  # 100 KB hold two blocks of 49 KB and the system's
        ("sm_120", 32, 102000, 4, 0),  # a block may ask for 99 KB
    ],
)
def test_blocks_per_multiprocessor_follow_nvidias_rules(target, regs, shared, warps, blocks):
    assert compile_report.occupancy(target, {"regs": regs, "shared_bytes": shared, "warps": warps}) == blocks


ROW = dict.fromkeys(compile_report.COLUMNS, 0)


def test_json_is_printed_alone_and_status_1_says_that_a_budget_broke(monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "report", lambda: [ROW])
    monkeypatch.setattr(compile_report, "computed_ratios", lambda rows: {})
    for broken, status in (([], 0), (["too much"], 1)):
        monkeypatch.setattr(compile_report, "broken_budgets", lambda rows, broken=broken: broken)
        assert compile_report.main(["--json", "--check"]) == status
        assert json.loads(capsys.readouterr().out) == [ROW]
        assert compile_report.main(["--json"]) == 0
        capsys.readouterr()
    assert compile_report.main([]) == 0
    assert "computed, never measured" in capsys.readouterr().out


def test_the_report_says_what_it_needs_under_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_report.main([]) == 2
    assert "TRITON_INTERPRET unset" in capsys.readouterr().err
