"""Cases of what encoders of the 2020s brought, and of whole blocks; `CASES`, every kernel's.

RMSNorm, rotary positions with QK-norm, the activation of a gated MLP, and a block with all of them and with fewer heads
of k and v than of q; beside it the block of BERT and ViT. See cases.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from .. import kernels
from ..kernels import Attention, Group, Half, Linear, Norm, Turn
from .cases import (
    ASSEMBLIES,
    ATTENTIONS,
    EPS,
    LINEARS,
    LOW,
    OTHERS,
    SCALING,
    Case,
    Draw,
    Operands,
    Outputs,
    float_weight,
)

NO_PRODUCT = ("bf16", "fp16", "fp32")  # there is none to round to TF32


# ------------------------------------------------------------------------------------------------------- norm and gate
def rms_norm(o: Operands) -> Outputs:
    return {"y": kernels.rms_norm(o["x"], o["gamma"], EPS)}


def rms_norm_case(name: str, lead: tuple[int, ...], width: int, strided: bool = False) -> Case:
    def make(draw: Draw) -> Operands:
        return {"x": draw.low(*lead, width), "gamma": draw.learned(width, mean=1.0)}

    strides = ("x",) if strided else ()
    return Case("rms_norm", name, make, rms_norm, ("x", "gamma"), None, NO_PRODUCT, strides, bitwise=False)


def gated(o: Operands) -> Outputs:
    return {"y": kernels.gated(o["h"], o["activation"])}


def gated_case(name: str, lead: tuple[int, ...], width: int, activation: str = "silu", strided: bool = False) -> Case:
    def make(draw: Draw) -> Operands:
        return {"h": draw.low(*lead, 2 * width), "activation": activation}

    return Case("gated", name, make, gated, ("h",), None, NO_PRODUCT, ("h",) if strided else ())


# -------------------------------------------------------------------------------------------------------------- rotary
def angles(draw: Draw, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, width / 2]"""
    drawn = draw.learned(rows, width // 2, std=3.0)
    return drawn.cos(), drawn.sin()


def rotary(o: Operands) -> Outputs:
    x = o["x"]
    rows = torch.empty_strided(x.shape, o["strides"], dtype=x.dtype, device=x.device).copy_(x)  # to be written over
    return {"rows": kernels.rotary(rows, o["heads"], o["cos"], o["sin"], o["weight"], EPS)}


def rotary_case(
    name: str,
    rows: int,
    heads: int,
    width: int,
    rest: int = 0,
    turned: bool = True,
    normed: bool = True,
    apart: str | None = None,
) -> Case:
    """`rest` columns behind the heads; `apart`: "rows" or "columns" that do not lie side by side."""

    def make(draw: Draw) -> Operands:
        columns = heads * width + rest
        cos, sin = angles(draw, rows, width) if turned else (None, None)
        strides = {None: (columns, 1), "rows": (2 * columns, 1), "columns": (1, max(1, rows))}[apart]
        weight = draw.learned(heads, width, mean=1.0) if normed else None
        given = {"heads": heads, "cos": cos, "sin": sin, "weight": weight, "strides": strides}
        return {"x": draw.low(rows, columns)} | given

    return Case("rotary", name, make, rotary, ("x",), None, NO_PRODUCT)


PARTS = [
    rms_norm_case("aligned", (2, 65), 256),
    rms_norm_case("odd", (7, 5), 37),
    rms_norm_case("strided", (7, 5), 37, strided=True),
    rms_norm_case("one row", (1,), 256),
    rms_norm_case("no rows", (0, 5), 256),
    gated_case("aligned", (2, 65), 256),
    gated_case("odd", (7, 5), 51, "gelu"),
    gated_case("strided", (7, 5), 51, strided=True),
    gated_case("one row", (1,), 256),
    gated_case("no rows", (0, 5), 256),
    rotary_case("aligned", 130, 4, 64, 128),
    rotary_case("odd", 37, 3, 10, 7),
    rotary_case("positions alone", 37, 3, 10, 7, normed=False),
    rotary_case("QK-norm alone", 37, 3, 10, 7, turned=False),
    rotary_case("strided rows", 37, 3, 10, 7, apart="rows"),
    rotary_case("strided columns", 37, 3, 10, 7, apart="columns"),
    rotary_case("one row", 1, 4, 64, 128),
    rotary_case("no rows", 0, 4, 64, 128),
]


# -------------------------------------------------------------------------------------------------------------- blocks
LINEARS_OF_A_BLOCK = ("qkv", "o", "fc1", "fc2")


def transformer_block(o: Operands) -> Outputs:
    def linear(of: str, groups: int = 1, lead: int = 1) -> Linear:
        weight, bias, a, b, scale = (o[f"{of} {n}"] for n in ("weight", "bias", "lora_a", "lora_b", "weight_scale"))
        return Linear(weight, bias, a, b, scale, SCALING, groups, lead)

    modern, heads, kv_heads = o["cos"] is not None, o["heads"], o["kv_heads"]
    norms = (Norm(o[f"gamma{i}"], o[f"beta{i}"], EPS, modern) for i in ("", " 2"))
    attention = Half(next(norms), linear("qkv", 3, heads // kv_heads), linear("o"))
    mlp = Half(next(norms), linear("fc1", 2 if modern else 1), linear("fc2"))
    batch, rows, _ = o["x"].shape
    see = Attention(heads, (batch, rows, rows), None, 0, modern, kv_heads)
    turn = Turn(heads + kv_heads, o["cos"], o["sin"], o["of heads"], EPS) if modern else None
    return {"z": kernels.transformer_block(o["x"], attention, mlp, see, "gated_silu" if modern else "gelu", turn)}


def block_formula(o: Operands, in_library: bool = False) -> Outputs:
    """The block from its parts; attention as its formula, or as PyTorch's own."""
    x, modern, heads, kv_heads = o["x"], o["cos"] is not None, o["heads"], o["kv_heads"]
    for of in LINEARS_OF_A_BLOCK:
        o = float_weight(o, x, of + " ")

    def linear(h: Tensor, of: str, groups: int = 1, lead: int = 1) -> Tensor:
        weight, bias, a, b = (o[f"{of} {n}"] for n in ("weight", "bias", "lora_a", "lora_b"))
        return kernels.lora_linear(h, weight, bias, a, b, SCALING, groups=groups, lead=lead)

    def norm(x: Tensor, i: str) -> Tensor:
        gamma, beta = o[f"gamma{i}"], o[f"beta{i}"]
        return kernels.rms_norm(x, gamma, EPS) if modern else kernels.layer_norm(x, gamma, beta, EPS)

    h = linear(norm(x, ""), "qkv", 3, heads // kv_heads).flatten(0, 1)
    if modern:
        h = kernels.rotary(h, heads + kv_heads, o["cos"], o["sin"], o["of heads"], EPS)
    if in_library:
        by_head = h.view(*x.shape[:2], heads + 2 * kv_heads, x.shape[2] // 2).transpose(1, 2)  # [B, heads, S, Dh]
        q, k, v = by_head.split((heads, kv_heads, kv_heads), 1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=modern, enable_gqa=modern)
        out = out.transpose(1, 2).flatten(2)
    else:
        groups = [Group(x.shape[0], x.shape[1], x.shape[1])]
        out, _ = kernels.attention_rows(h, None, heads, groups, causal=modern, kv_heads=kv_heads)
        out = out.view(*x.shape[:2], out.shape[1])
    x = x + linear(out, "o")
    h = linear(norm(x, " 2"), "fc1", 2 if modern else 1)
    return {"z": x + linear(kernels.gated(h, "silu") if modern else functional.gelu(h), "fc2")}


def block_case(
    name: str, batch: int, rows: int, width: int, rank: int, int8: bool = False, modern: bool = False
) -> Case:
    """Heads are half as wide as rows: two of q, k and v each, or four of q and two of k and v."""
    heads, kv_heads, gates = (4, 2, 2) if modern else (2, 2, 1)
    head = width // 2

    def make(draw: Draw) -> Operands:
        o = {"x": draw.low(batch, rows, width), "heads": heads, "kv_heads": kv_heads}
        for i in ("", " 2"):
            o[f"gamma{i}"] = draw.learned(width, mean=1.0, std=0.1)
            o[f"beta{i}"] = None if modern else draw.learned(width)
        o["cos"], o["sin"] = angles(draw, batch * rows, head) if modern else (None, None)
        o["of heads"] = draw.learned(heads + kv_heads, head, mean=1.0, std=0.1) if modern else None
        sizes = {"qkv": ((heads + 2 * kv_heads) * head, width, 3), "o": (width, heads * head, 1)}
        sizes |= {"fc1": (2 * gates * width, width, gates), "fc2": (width, 2 * width, 1)}
        for of, (n, k, groups) in sizes.items():
            o |= draw.linear(n, k, rank, groups, int8, of + " ")
        return o

    leaves = tuple(f"{of} {name}" for of in LINEARS_OF_A_BLOCK for name in ("bias", "lora_a", "lora_b"))
    trained = ("x", "gamma", "beta", "gamma 2", "beta 2", *leaves)
    dtypes = ("bf16", "fp16") if int8 else LOW
    function = "modern_block" if modern else "transformer_block"
    given = function, name, make, transformer_block, trained, block_formula, dtypes
    return Case(*given, bitwise=False, in_library=partial(block_formula, in_library=True))


BLOCKS = [
    block_case("aligned", 2, 65, 128, 8),
    block_case("odd", 2, 21, 40, 6),
    block_case("no samples", 0, 65, 128, 8),
    block_case("int8", 2, 65, 128, 8, int8=True),
    block_case("aligned", 2, 65, 128, 8, modern=True),
    block_case("odd", 2, 21, 40, 6, modern=True),
    block_case("no samples", 0, 65, 128, 8, modern=True),
    block_case("int8", 2, 65, 128, 8, int8=True, modern=True),
]
CASES = [*LINEARS, *ASSEMBLIES, *ATTENTIONS, *OTHERS, *PARTS, *BLOCKS]
