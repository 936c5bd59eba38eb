"""The budgets that the compile report checks on what compile_cases.py launches.

`FLOPS` counts the multiplications and additions of a launch, ranks padded to their tile, from its arguments by name;
its bytes are those of its tensors, each moved once.
"""

from __future__ import annotations

from .compile_cases import VIT_B


def _padded(a: dict) -> int:
    return -(-a["R"] // a["BR"]) * a["BR"] if a["R"] else 0


def _columns(a: dict) -> int:
    return (a["GROUPS"] + a["LEAD"] - 1) * a["WIDTH"]


FLOPS = {
    "linear_lowrank_forward": lambda a: 2 * a["M"] * _columns(a) * (a["K"] + _padded(a)),
    "lora_linear_project": lambda a: 2 * a["M"] * a["K"] * _padded(a),
    "lora_linear_backward_low_rank": lambda a: 4 * a["M"] * _columns(a) * _padded(a),
    "lora_linear_backward_input": lambda a: 2 * a["M"] * a["K"] * (a["N"] + _padded(a)),
    "reduce_rows": lambda a: 2 * a["M"] * a["C"] * _padded(a),
    "sum_parts": lambda a: a["split"] * a["n"],
    "quantize_rows_kernel": lambda a: 6 * a["N"] * a["K"],
    "assemble_norm_project_forward": lambda a: 2 * a["M"] * a["K"] * (4 + _padded(a)),
    "assemble_norm_project_backward": lambda a: 2 * a["M"] * a["K"] * (6 + 2 * _padded(a)),
    "assemble_norm_project_lora_grad": lambda a: 2 * a["M"] * a["K"] * (2 + _padded(a)),
    "substitute_forward": lambda a: 3 * a["M"] ** 2 * a["B"] * a["D"],
    "substitute_backward": lambda a: 4 * a["M"] ** 2 * a["B"] * a["D"],
    "attention_small_query_forward": lambda a: 4 * VIT_B.batch * a["H"] * a["BQ"] * a["S"] * a["DH"],
    "attention_small_query_backward": lambda a: 10 * VIT_B.batch * a["H"] * a["BQ"] * a["S"] * a["DH"],
    "attention_short_forward": lambda a: 4 * VIT_B.rows * VIT_B.tokens * a["H"] * a["DH"],
    "attention_short_backward": lambda a: 14 * VIT_B.rows * VIT_B.tokens * a["KV_HEADS"] * a["SHARE"] * a["DH"],
    "rotary_forward": lambda a: 7 * a["N"] * a["HEADS"] * 2 * a["HALF"],
    "rotary_backward": lambda a: 12 * a["N"] * a["HEADS"] * 2 * a["HALF"],
    "gated_forward_kernel": lambda a: 6 * a["M"] * a["F"],
    "gated_backward_kernel": lambda a: 12 * a["M"] * a["F"],
}
GEMMS = {"linear_lowrank_forward", "lora_linear_backward_input"}  # matrix units, wide pipelined loads, 2 blocks per SM
MATRIX_UNITS = GEMMS | {"lora_linear_project", "lora_linear_backward_low_rank", "reduce_rows"}  # and wide loads
MATRIX_UNITS |= {"assemble_norm_project_forward", "assemble_norm_project_lora_grad"}
MATRIX_UNITS |= {"attention_small_query_forward", "attention_small_query_backward"}
MATRIX_UNITS |= {"attention_short_forward", "attention_short_backward"}
MINIMUM_RATIO = 1.05
# Bytes that a thread may spill at rank 64, on cards alone.
SPILLS = {"lora_linear_project": 16, "assemble_norm_project_backward": 16}
SPILLING = ("sm_86", "sm_89", "sm_120")
# And with the ptxas of Triton before 3.9, for which the tiles were chosen, (kernel, target) at any rank.
EARLIER_SPILLS = {("lora_linear_project", "sm_100"): 16, ("assemble_norm_project_forward", "sm_120"): 8}

# (what, limit, products of the library beside ours, {(function, phase, variant): how often it counts}): computed time
# on an H100, ViT-B, r = 8, in units of the frozen q, k, v product alone; of the norm's backward only what the adapter
# adds to it
RATIOS = (
    (
        "forward of LayerNorm and q, k, v",
        1.30,
        0,
        {("assemble_norm_project", "forward", "bf16"): 1, ("linear_lowrank", "forward", "bf16"): 1},
    ),
    (
        "backward of LayerNorm and q, k, v",
        1.75,
        1,  # dX = dY W
        {
            ("linear_lowrank", "backward", "bf16"): 1,
            ("assemble_norm_project", "backward", "bf16"): 1,
            ("assemble_norm_project", "backward", "no adapter"): -1,
        },
    ),
    ("backward of lora_linear", 1.75, 0, {("lora_linear", "backward", "bf16"): 1}),
)
