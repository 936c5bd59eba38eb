"""Planted slips in the Triton kernels and their launchers: the checks of the kernel tests must notice every one.

A mutant that survives means a missing test. To add one: the file, a text that stands in it, what it becomes, a probe.
"""

import functools

import fusion_mutants
import pytest
import torch
from linear_cases import DROPOUT, SEED, Case, assert_right, operands, with_gradients
from mutants import Mutant, copy_of_kernels
from triton.runtime.errors import InterpreterError
from triton_interpreter import interpreted

from u2a_fast.kernels.dropout import kept

SANITIZERS = ("bounds", "races", "order")
SMALL = Case(lead=(2, 19), k=72, n=96, groups=3)
INT8 = Case(lead=(2, 19), k=72, n=96, groups=3, weight="int8")
W8A8 = Case(lead=(2, 19), k=72, n=96, groups=3, weight="w8a8")
WIDE_Q = Case(lead=(2, 19), k=72, n=96, groups=2, wide=3)
DROPPED = Case(lead=(2, 19), k=72, n=96, groups=3, dropout=DROPOUT)
WIDE_DROPPED = Case(k=140, dropout=DROPOUT)
TILES = Case(lead=(150,), k=140, n=300, r=70, groups=2)  # several tiles of rows and columns, two steps of ranks
SPLITS = Case(lead=(140,), k=40, n=24, r=1)  # rows summed in two ranges


def linear(case, sanitizers=SANITIZERS):
    """A probe: lora_linear's result and gradients on `case`, under the sanitizers."""
    return functools.partial(_linear, case, sanitizers)


def _linear(case, sanitizers, kernels):
    given = operands(case, torch.float32)
    mask = None
    if case.dropout:
        rows = torch.Size(case.lead).numel()
        mask = kept(rows, case.k, case.dropout, torch.tensor(SEED)).view(*case.lead, case.k)
    with interpreted(sanitizers, backend=kernels.backend):
        got = with_gradients(kernels.lora_linear, given)
    assert_right(got, given, torch.float32, mask)


def quantized(kernels):
    """A probe: no element off by more than half a step, a row of zeros finite."""
    w = torch.randn(11, 700) + 0.5
    w[3] = 0
    with interpreted(SANITIZERS, backend=kernels.backend):
        q, scale = kernels.quantize_rows(w)
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()
    assert torch.equal(scale, w.abs().amax(1) / 127)


LINEAR, PROJECT, BACKWARD, REDUCE = "linear_lowrank.py", "lora_linear.py", "linear_backward.py", "reduce.py"
TILED = linear(TILES, ("bounds", "order"))
TILED_DROPPED = linear(Case(lead=(150,), k=140, n=300, r=70, groups=2, dropout=DROPOUT), ("bounds", "order"))
MUTANTS = {
    # which rows and columns
    "weight rows a group's width apart": Mutant(
        LINEAR, "column % WIDTH)[None, :] * PITCH", "column % WIDTH)[None, :] * WIDTH", linear(SMALL)
    ),
    "every group uses the first S": Mutant(LINEAR, "group * R + rr[None, :]", "rr[None, :]", linear(SMALL)),
    "columns counted over all groups": Mutant(LINEAR, "nok = column < WIDTH", "nok = rn < WIDTH", linear(SMALL)),
    "first group a block too wide": Mutant("tiling.py", "block - (LEAD - 1)", "block - LEAD", linear(WIDE_Q)),
    "last group of row tiles too high": Mutant("tiling.py", "(8 * NN)) % rows", "(8 * NN)) % 8", TILED),
    "every rank block projects the first": Mutant(
        PROJECT, "rr = tl.program_id(1) * BR + tl.arange", "rr = tl.arange", TILED
    ),
    "last rank step dropped": Mutant(LINEAR, "tl.range(0, R, BR", "tl.range(0, R - BR, BR", TILED),
    "last rank step of dX dropped": Mutant(BACKWARD, "tl.range(0, R, BR", "tl.range(0, R - BR, BR", TILED_DROPPED),
    # masks
    "no tail mask on K": Mutant(LINEAR, "rk < K - k", "rk < K", linear(SMALL)),
    "no tail mask on N in dX": Mutant(BACKWARD, "(rn < N - n)", "(rn < N)", TILED_DROPPED),
    "store without the column mask": Mutant(
        LINEAR, "mok[:, None] & nok[None, :]\n    if RESIDUAL", "mok[:, None]\n    if RESIDUAL", TILED
    ),
    "padding ranks of B not masked": Mutant(
        LINEAR, "mask=nok[None, :] & (rr < R)[:, None]", "mask=nok[None, :]", linear(SMALL)
    ),
    "padding ranks of A not masked": Mutant(BACKWARD, "mask=(rr < R)[:, None] & kok", "mask=kok", linear(DROPPED)),
    # terms and factors
    "scaling forgotten in y": Mutant(LINEAR, "(b.to(WIDE) * scaling)", "b", linear(SMALL)),
    "scaling forgotten in G": Mutant(REDUCE, "pid, scale, n", "pid, 1.0, n", linear(SMALL)),
    "scaling forgotten in dB": Mutant(REDUCE, "pid - first, scale", "pid - first, 1.0", linear(SMALL)),
    "bias forgotten": Mutant(LINEAR, "if BIAS is not None", "if BIAS is None", linear(SMALL)),
    "dX without G A": Mutant(BACKWARD, "if G is not None", "if G is None", linear(DROPPED)),
    "weight's scale forgotten in y": Mutant(LINEAR, "if WS is not None", "if WS is None", linear(INT8)),
    "weight's scale forgotten in dX": Mutant(BACKWARD, "if WS is not None", "if WS is None", linear(INT8)),
    "input's scale forgotten": Mutant(LINEAR, "if HS is not None", "if HS is None", linear(W8A8)),
    # reductions
    "parts of G in one slot": Mutant(BACKWARD, "part.to(tl.int64) * M", "0 * M", TILED),
    "parts of G of a wide group in one slot": Mutant(BACKWARD, "block * tiles, 0)", "0, 0)", linear(WIDE_Q)),
    "dB's row ranges overlap": Mutant(BACKWARD, "(split + 1) * rows, M", "(split + 1) * rows + 1, M", linear(SPLITS)),
    "dA's row ranges overlap": Mutant(REDUCE, "(split + 1) * rows, M", "(split + 1) * rows + 1, M", linear(SPLITS)),
    "every range writes slot 0": Mutant(REDUCE, "split.to(tl.int64) * R * C", "0 * R * C", linear(SPLITS)),
    "last part dropped": Mutant(REDUCE, "for i in range(split)", "for i in range(split - 1)", linear(SMALL)),
    # dropout
    "S not masked": Mutant(PROJECT, "dropped_below), x, 0", "-(2**31)), x, 0", linear(DROPPED)),
    "dX not masked": Mutant(
        BACKWARD, "dropped_below), acc * scale, 0.0", "-(2**31)), acc * scale, 0.0", linear(DROPPED)
    ),
    "dA not masked": Mutant(REDUCE, "dropped_below), x, 0", "-(2**31)), x, 0", linear(DROPPED)),
    "what is kept in dA not scaled": Mutant(REDUCE, "parts, 1 / (1 - p)", "parts, 1.0", linear(DROPPED)),
    "mask counts columns within a tile": Mutant(
        PROJECT, "rm, k + rk, dropped", "rm, rk, dropped", linear(WIDE_DROPPED)
    ),
    # quantisation
    "rounds down": Mutant("quantize.py", "(x + 12582912.0) - 12582912.0", "x", quantized),
    "magnitudes of the last piece only": Mutant("quantize.py", "tl.maximum(largest, ", "tl.maximum(0.0, ", quantized),
    "128 steps instead of 127": Mutant("quantize.py", "scale = largest / 127", "scale = largest / 128", quantized),
} | fusion_mutants.MUTANTS


@pytest.mark.slow
def test_the_unchanged_kernels_pass_every_probe():
    with copy_of_kernels() as kernels:
        for probe in {m.probe for m in MUTANTS.values()}:
            probe(kernels)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a mutant may overflow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_slip_is_noticed(name):
    with copy_of_kernels(MUTANTS[name]) as kernels, pytest.raises((AssertionError, InterpreterError)):
        MUTANTS[name].probe(kernels)
