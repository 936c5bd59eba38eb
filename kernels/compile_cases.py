"""What the compile report compiles, and the budgets it checks.

A case calls launchers as its op does, on meta tensors of real models' sizes; whatever they launch becomes a row.
`FLOPS` counts the multiplications and additions of a launch, ranks padded to their tile, from its arguments by name;
its bytes are those of its tensors, each moved once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_backward import linear_backward_triton
from .linear_lowrank import linear_lowrank_triton
from .lora_linear import project_triton
from .quantize import launch_quantize_rows


@dataclass(frozen=True)
class Shape:
    model: str
    batch: int
    tokens: int
    width: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


VIT_B = Shape("ViT-B", 64, 197, 768)
SHAPES = (VIT_B, Shape("ViT-L", 64, 197, 1024), Shape("BERT-base", 64, 128, 768))
RANKS = (8, 64)
GROUPS = 3  # q, k, v in one product


@dataclass(frozen=True)
class Case:
    """`run(shape, rank)` launches `phase` ("forward" or "backward") of the public function `function`.

    `minimum_bytes(shape, rank)`: what any implementation must read and write; the launches may move 1.05 times as much.
    """

    function: str
    phase: str
    variant: str
    run: Callable[[Shape, int], object]
    ranks: tuple[int, ...] = RANKS
    minimum_bytes: Callable[[Shape, int], int] | None = None


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(n: int, k: int, int8: bool) -> tuple[Tensor, Tensor | None]:
    return (meta(n, k, dtype=torch.int8), meta(n, dtype=torch.float32)) if int8 else (meta(n, k), None)


def _seed(dropout: float) -> Tensor | None:
    return meta(dtype=torch.int64) if dropout else None


def _adapter(shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    a = meta(GROUPS * rank, shape.width, dtype=torch.float32)
    return a, meta(GROUPS * shape.width, rank, dtype=torch.float32)


def frozen_linear(shape: Shape, rank: int):
    """The yardstick: the q, k, v product alone."""
    n = GROUPS * shape.width
    linear_lowrank_triton(meta(shape.rows, shape.width), meta(n, shape.width), meta(n), None, None, 1.0, None, 1, False)


def linear_lowrank_forward(shape: Shape, rank: int, int8: bool = False, quantize_input: bool = False):
    k, n = shape.width, GROUPS * shape.width
    weight, scale = _weight(n, k, int8)
    s, lora_b = meta(shape.rows, GROUPS * rank), _adapter(shape, rank)[1]
    h = meta(shape.rows, k)
    linear_lowrank_triton(h, weight, meta(n), s, lora_b, 2.0, scale, GROUPS, quantize_input)


def linear_lowrank_backward(shape: Shape, rank: int, int8: bool = False):
    n = GROUPS * shape.width
    weight, scale = _weight(n, shape.width, int8)
    s, lora_b = meta(shape.rows, GROUPS * rank), _adapter(shape, rank)[1]
    linear_backward_triton(meta(shape.rows, n), None, weight, scale, s, None, lora_b, 2.0, GROUPS, 0.0, None, True)


def lora_linear_forward(shape: Shape, rank: int, dropout: float = 0.0):
    project_triton(meta(shape.rows, shape.width), _adapter(shape, rank)[0], dropout, _seed(dropout))
    if not dropout:
        linear_lowrank_forward(shape, rank)


def lora_linear_backward(shape: Shape, rank: int, int8: bool = False, dropout: float = 0.0):
    n = GROUPS * shape.width
    weight, scale = _weight(n, shape.width, int8)
    operands = (meta(shape.rows, n), meta(shape.rows, shape.width), weight, scale, meta(shape.rows, GROUPS * rank))
    linear_backward_triton(*operands, *_adapter(shape, rank), 2.0, GROUPS, dropout, _seed(dropout), False)


CASES = [
    Case("lora_linear", "forward", "frozen", frozen_linear, ranks=(8,)),
    Case("lora_linear", "forward", "bf16", lora_linear_forward),
    Case("lora_linear", "forward", "dropout", lambda s, r: lora_linear_forward(s, r, dropout=0.1), ranks=(8,)),
    Case("lora_linear", "backward", "bf16", lora_linear_backward),
    Case("lora_linear", "backward", "dropout", lambda s, r: lora_linear_backward(s, r, dropout=0.1), ranks=(8,)),
    Case("linear_lowrank", "forward", "bf16", linear_lowrank_forward),
    Case("linear_lowrank", "forward", "int8", lambda s, r: linear_lowrank_forward(s, r, int8=True), ranks=(8,)),
    Case("linear_lowrank", "forward", "int8 x int8", lambda s, r: linear_lowrank_forward(s, r, True, True), ranks=(8,)),
    Case("linear_lowrank", "backward", "bf16", linear_lowrank_backward),
    Case("linear_lowrank", "backward", "int8", lambda s, r: linear_lowrank_backward(s, r, int8=True), ranks=(8,)),
    Case("quantize_rows", "forward", "bf16", lambda s, _: launch_quantize_rows(meta(s.rows, s.width)), ranks=(8,)),
]


def _padded(a: dict) -> int:
    return -(-a["R"] // a["BR"]) * a["BR"] if a["R"] else 0


FLOPS = {
    "linear_lowrank_forward": lambda a: 2 * a["M"] * a["GROUPS"] * a["WIDTH"] * (a["K"] + _padded(a)),
    "lora_linear_project": lambda a: 2 * a["M"] * a["K"] * _padded(a),
    "lora_linear_backward_low_rank": lambda a: 4 * a["M"] * a["GROUPS"] * a["WIDTH"] * _padded(a),
    "lora_linear_backward_input": lambda a: 2 * a["M"] * a["K"] * (a["N"] + _padded(a)),
    "reduce_rows": lambda a: 2 * a["M"] * a["C"] * _padded(a),
    "sum_parts": lambda a: a["split"] * a["n"],
    "quantize_rows_kernel": lambda a: 6 * a["N"] * a["K"],
}
GEMMS = {"linear_lowrank_forward", "lora_linear_backward_input"}  # matrix units, wide pipelined loads, 2 blocks per SM
MATRIX_UNITS = GEMMS | {"lora_linear_project", "lora_linear_backward_low_rank", "reduce_rows"}  # and wide loads
MINIMUM_RATIO = 1.05

# (what, limit, {(function, phase, variant): how often it counts}): computed time on an H100, ViT-B, r = 8, in units of
# the frozen q, k, v product alone; of the norm's backward only what the adapter adds to it counts
RATIOS = (
    (
        "forward of LayerNorm and q, k, v",
        1.30,
        {("assemble_norm_project", "forward", "bf16"): 1, ("linear_lowrank", "forward", "bf16"): 1},
    ),
    (
        "backward of LayerNorm and q, k, v",
        1.75,
        {
            ("linear_lowrank", "backward", "bf16"): 1,
            ("assemble_norm_project", "backward", "bf16"): 1,
            ("assemble_norm_project", "backward", "no adapter"): -1,
        },
    ),
    ("backward of lora_linear", 1.75, {("lora_linear", "backward", "bf16"): 1}),
)
YARDSTICK = ("lora_linear", "forward", "frozen")
