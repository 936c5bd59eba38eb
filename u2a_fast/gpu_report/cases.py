"""Small operands for the kernels: aligned, odd, strided, of one row and of none; `cases_modern.CASES` are all of them.

Data has a non-zero mean: an unmasked tail or a forgotten term hides behind zero-mean data. Rows that must not be read
hold NaN. A case's formula is its call under the reference backend; where int8 is involved, on the dequantised weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Group

Operands = dict[str, Any]
Outputs = dict[str, Tensor | None]
LOW = ("bf16", "fp16", "fp32", "tf32")
SCALING, EPS, SEED = 0.7, 1e-5, 5


class Draw:
    """Operands by name: in the case's dtype, or, what trains, in fp32 at least."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def low(self, *shape: int, mean: float = 0.5, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (values * std + mean).to(self.dtype)

    def learned(self, *shape: int, mean: float = 0.1, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (values * std + mean).float()

    def linear(self, n: int, k: int, rank: int | None, groups: int = 1, int8: bool = False, of: str = "") -> Operands:
        """The operands of a frozen linear with an adapter; their names start with `of`."""
        weight, scale = self.low(n, k, mean=0.0, std=k**-0.5), None
        if int8:
            weight, scale = kernels.quantize_rows(weight)
        a, b = (None, None) if rank is None else (self.learned(groups * rank, k, std=k**-0.5), self.learned(n, rank))
        named = {"weight": weight, "bias": self.learned(n), "lora_a": a, "lora_b": b, "weight_scale": scale}
        return {of + name: value for name, value in named.items()}


@dataclass(frozen=True)
class Case:
    function: str
    name: str
    make: Callable[[Draw], Operands]
    call: Callable[[Operands], Outputs]
    trained: tuple[str, ...] = ()
    formula: Callable[[Operands], Outputs] | None = None
    dtypes: tuple[str, ...] = LOW
    strided: tuple[str, ...] = ()  # operands that become views of every other column
    bitwise: bool = True  # False: a library's kernels run too, which may add up in any order
    in_library: Callable[[Operands], Outputs] | None = None  # the formula again, by what PyTorch has for it


# ------------------------------------------------------------------------------------------------------------- linears
def float_weight(o: Operands, like: Tensor, of: str = "") -> Operands:
    """The operands with an int8 weight dequantised to the dtype of `like`."""
    if o[of + "weight_scale"] is None:
        return o
    wide = torch.promote_types(like.dtype, torch.float32)
    weight = o[of + "weight"].to(wide) * o[of + "weight_scale"].to(wide)[:, None]
    return o | {of + "weight": weight.to(like.dtype), of + "weight_scale": None}


def rounded(x: Tensor) -> Tensor:
    """Rows rounded to int8, differentiated as if they were not."""
    values = x.detach().float()
    step = values.abs().amax(-1, keepdim=True) / 127
    return x + (((values / step).round() * step).to(x.dtype) - x.detach())


def lora_linear(o: Operands) -> Outputs:
    low = o["lora_a"], o["lora_b"], SCALING, o["weight_scale"], o["groups"], o["lead"]
    return {"y": kernels.lora_linear(o["x"], o["weight"], o["bias"], *low, o["dropout"], SEED, o["quantize"])}


def linear_lowrank(o: Operands) -> Outputs:
    low = o["s"], o["lora_b"], SCALING, o["weight_scale"], o["groups"], o["lead"], o["quantize"]
    return {"y": kernels.linear_lowrank(o["x"], o["weight"], o["bias"], *low)}


def norm_linear(o: Operands) -> Outputs:
    low = o["lora_a"], o["lora_b"], SCALING, o["weight_scale"], o["groups"], o["lead"], o["quantize"]
    norm = o["gamma"], o["beta"], EPS
    y, rows = kernels.norm_linear(o["x"], *norm, o["weight"], o["bias"], *low, rms=o["rms"])
    return {"y": y, "rows": rows}


def on_floats(call: Callable[[Operands], Outputs]) -> Callable[[Operands], Outputs]:
    """The formula of lora_linear and linear_lowrank."""

    def formula(o: Operands) -> Outputs:
        if o["quantize"]:
            o = o | {"x": rounded(o["x"]), "quantize": False}
        return call(float_weight(o, o["x"]))

    return formula


def norm_linear_formula(o: Operands) -> Outputs:
    norm = {"norm_weight": o["gamma"], "norm_bias": o["beta"], "eps": EPS, "rms": o["rms"]}
    h, s, rows = kernels.assemble_norm_project(tokens=o["x"], lora_a=o["lora_a"], **norm)
    o = float_weight(o, o["x"]) | {"x": rounded(h) if o["quantize"] else h, "s": s, "quantize": False}
    return linear_lowrank(o) | {"rows": rows}


def linear_case(
    function: str,
    name: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    rank: int | None = 8,
    groups: int = 1,
    lead: int = 1,
    int8: bool = False,
    quantize: bool = False,
    dropout: float = 0.0,
    strided: bool = False,
    rms: bool = False,
) -> Case:
    call = {"lora_linear": lora_linear, "linear_lowrank": linear_lowrank, "norm_linear": norm_linear}[function]
    given_s = function == "linear_lowrank"

    def make(draw: Draw) -> Operands:
        o = {"x": draw.low(*rows, k)} | draw.linear(n, k, rank, groups, int8)
        o |= {"groups": groups, "lead": lead, "quantize": quantize, "dropout": dropout}
        if given_s:
            o |= {"s": draw.low(*rows, groups * (rank or 0)), "lora_a": None}
        if function == "norm_linear":
            o |= {"gamma": draw.learned(k, mean=1.0), "beta": None if rms else draw.learned(k), "rms": rms}
        return o

    trained = ("x", "bias", "lora_a", "lora_b", "s", "gamma", "beta")
    formula = norm_linear_formula if function == "norm_linear" else on_floats(call)
    dtypes = ("bf16",) if quantize else ("bf16", "fp16") if int8 else LOW
    return Case(function, name, make, call, trained, formula, dtypes, ("x",) if strided else ())


ALIGNED: dict[str, Any] = {"k": 256, "n": 384, "groups": 3}
ODD: dict[str, Any] = {"k": 37, "n": 51, "groups": 3}
LINEARS = [
    linear_case("lora_linear", "aligned", (2, 128), **ALIGNED),
    linear_case("lora_linear", "odd", (7, 5), rank=6, **ODD),
    linear_case("lora_linear", "strided", (37,), rank=6, strided=True, **ODD),
    linear_case("lora_linear", "one row", (1,), **ALIGNED),
    linear_case("lora_linear", "no rows", (0, 5), **ALIGNED),
    linear_case("lora_linear", "dropout", (3, 30), dropout=0.3, **ALIGNED),
    linear_case("lora_linear", "int8", (150,), int8=True, **ALIGNED),
    linear_case("lora_linear", "int8 x int8", (150,), int8=True, quantize=True, **ALIGNED),
    linear_case("linear_lowrank", "aligned", (2, 128), **ALIGNED),
    linear_case("linear_lowrank", "odd", (37,), rank=6, **ODD),
    linear_case("linear_lowrank", "rank 70", (150,), k=200, n=540, rank=70, groups=2),
    linear_case("linear_lowrank", "wide q", (37,), k=256, n=640, groups=3, lead=3),
    linear_case("linear_lowrank", "int8", (37,), rank=6, int8=True, **ODD),
    linear_case("linear_lowrank", "int8 x int8", (37,), rank=6, int8=True, quantize=True, **ODD),
    linear_case("linear_lowrank", "no rows", (0,), **ALIGNED),
    linear_case("norm_linear", "aligned", (2, 128), **ALIGNED),
    linear_case("norm_linear", "odd", (7, 5), rank=6, **ODD),
    linear_case("norm_linear", "one row", (1, 1), **ALIGNED),
    linear_case("norm_linear", "no rows", (0, 5), **ALIGNED),
    linear_case("norm_linear", "no adapter", (3, 50), rank=None, **ALIGNED),
    linear_case("norm_linear", "int8", (3, 50), int8=True, **ALIGNED),
    linear_case("norm_linear", "int8 x int8", (3, 50), int8=True, quantize=True, **ALIGNED),
    linear_case("norm_linear", "RMSNorm", (2, 128), rms=True, **ALIGNED),
    linear_case("norm_linear", "RMSNorm, odd", (7, 5), rank=6, rms=True, **ODD),
]


# ------------------------------------------------------------------------------------------------------------ assembly
def assembled(o: Operands) -> Outputs:
    if o["joins"]:
        names = ("tokens", "prefix", "suffix", "present", "mask_token")
        return {"rows": kernels.assemble(*(o[name] for name in names))}
    given = {name: value for name, value in o.items() if name != "joins"}
    h, s, rows = kernels.assemble_norm_project(**given, eps=EPS)
    return {"h": h, "s": s, "rows": rows}


def assemble_case(
    name: str,
    batch: int,
    tokens: int,
    width: int,
    prefix: int | None = None,
    suffix: int | None = None,
    rank: int | None = 24,
    presence: str | None = None,
    joins: bool = False,
    strided: bool = False,
    rms: bool = False,
) -> Case:
    """`joins`: rows alone, without norm and product. Every third sample is absent where there is a presence."""

    def make(draw: Draw) -> Operands:
        present = None if presence is None else torch.arange(batch) % 3 != 1
        rows = draw.low(batch, tokens, width, mean=1.5)
        if present is not None:
            rows[~present] = float("nan")
            rows = rows[present] if presence == "packed" else rows
        o = {
            "tokens": rows,
            "prefix": None if prefix is None else draw.learned(prefix, width),
            "suffix": None if suffix is None else draw.learned(suffix, width),
            "present": present,
            "mask_token": None if presence is None else draw.learned(width),
            "joins": joins,
        }
        if not joins:
            o |= {"norm_weight": draw.learned(width, mean=1.0), "norm_bias": None if rms else draw.learned(width)}
            o |= {"rms": rms, "lora_a": None if rank is None else draw.learned(rank, width, std=width**-0.5)}
        return o

    trained = ("tokens", "prefix", "suffix", "mask_token", "norm_weight", "norm_bias", "lora_a")
    function = "assemble" if joins else "assemble_norm_project"
    return Case(function, name, make, assembled, trained, strided=("tokens",) if strided else ())


ASSEMBLIES = [
    assemble_case("aligned", 4, 65, 256),
    assemble_case("everything", 4, 33, 256, 4, 1, presence="full"),
    assemble_case("packed, odd", 4, 5, 37, 2, 3, 6, presence="packed"),
    assemble_case("strided, no rank", 3, 7, 130, None, 2, None, strided=True),
    assemble_case("rank 70", 2, 6, 72, 3, None, 70),
    assemble_case("one row", 1, 1, 256),
    assemble_case("RMSNorm", 4, 33, 290, 4, rms=True),
    assemble_case("no rows", 0, 5, 256),
    assemble_case("everything", 4, 33, 256, 4, 1, presence="full", joins=True),
    assemble_case("packed, odd", 4, 5, 37, 2, 3, presence="packed", joins=True),
]


# ----------------------------------------------------------------------------------------------------------- attention
def attention(o: Operands) -> Outputs:
    k, v = o["kv"].permute(2, 0, 3, 1, 4)  # views of one buffer
    q = o["q"].transpose(1, 2)
    return {"out": kernels.attention(q, k, v, o["lengths"], suffix=o["suffix"], read_only=o["read_only"])}


def attention_case(
    name: str, batch: int, queries: int, keys: int, width: int, padded: bool = False, read_only: int = 0
) -> Case:
    """Where q has as many rows as k and v, they are attended by a library; few queries are ours."""

    def make(draw: Draw) -> Operands:
        lengths = torch.tensor([keys - 2, 0, keys // 2])[:batch] if padded else None
        buffers = {"q": draw.low(batch, queries, 2, width), "kv": draw.low(batch, keys, 2, 2, width)}
        return buffers | {"lengths": lengths, "suffix": int(padded), "read_only": read_only}

    return Case("attention", name, make, attention, ("q", "kv"), bitwise=queries < keys)


def attention_rows(o: Operands) -> Outputs:
    out, s = kernels.attention_rows(o["qkv"], None, 2, o["groups"], o["lora_a"], **o["seen"])
    return {"out": out, "s": s}


def rows_case(name: str, groups: list[Group], width: int, kv_heads: int = 2, **seen: int | bool) -> Case:
    def make(draw: Draw) -> Operands:
        rows = sum(group.samples * group.keys for group in groups)
        drawn = {"qkv": draw.low(rows, (2 + 2 * kv_heads) * width), "lora_a": draw.learned(8, 2 * width, std=0.1)}
        return drawn | {"groups": groups, "seen": seen | {"kv_heads": kv_heads}}

    return Case("attention_rows", name, make, attention_rows, ("qkv", "lora_a"), bitwise=False)


ATTENTIONS = [
    attention_case("few queries, aligned", 3, 4, 197, 64, padded=True),
    attention_case("few queries, odd", 3, 3, 37, 20),
    attention_case("one query", 1, 1, 64, 64),
    attention_case("no samples", 0, 4, 64, 64),
    attention_case("all queries", 2, 197, 197, 64),
    attention_case("read-only rows", 2, 70, 70, 64, read_only=4),
    rows_case("several lengths", [Group(2, 9, 9), Group(1, 20, 20), Group(3, 65, 65)], 64),
    rows_case("one length", [Group(3, 20, 20)], 64),
    rows_case("odd width", [Group(2, 9, 9), Group(1, 21, 21)], 20),
    rows_case("no rows", [Group(0, 9, 9)], 64),
    rows_case("shared keys, causal", [Group(2, 9, 9), Group(1, 20, 20), Group(3, 65, 65)], 64, 1, causal=True),
    rows_case("shared keys, one length", [Group(3, 20, 20)], 64, 1),
    rows_case("window", [Group(2, 9, 9), Group(2, 65, 65)], 64, 1, window=8),
    rows_case("window, learned rows", [Group(2, 9, 9), Group(2, 65, 65)], 64, 1, window=8, suffix=3, causal=True),
]


# -------------------------------------------------------------------------------------------------------------- others
def substitute(o: Operands) -> Outputs:
    fused, align = kernels.substitute(o["class_tokens"], o["proxies"], o["present"], stop_gradient=o["stop"])
    return {"fused": fused, "align": align}


def substitute_case(name: str, m: int, batch: int, width: int, stop: bool = True) -> Case:
    def make(draw: Draw) -> Operands:
        present = (torch.arange(batch)[:, None] + torch.arange(m)) % 3 != 1
        class_tokens = draw.low(m, batch, width)
        class_tokens[~present.t()] = float("nan")
        return {
            "class_tokens": class_tokens,
            "proxies": draw.low(m, m, batch, width),
            "present": present,
            "stop": stop,
        }

    return Case("substitute", name, make, substitute, ("class_tokens", "proxies"))


def quantized(o: Operands) -> Outputs:
    q, scale = kernels.quantize_rows(o["w"])
    return {"w": q.to(scale.dtype) * scale[:, None], "scale": scale}


def exactly(o: Operands) -> Outputs:
    """What rows come closest to: themselves, within half a step."""
    scale = o["w"].abs().amax(1) / 127
    return {"w": (o["w"] / scale[:, None]).round() * scale[:, None], "scale": scale}


def quantize_case(name: str, n: int, k: int, strided: bool = False) -> Case:
    dtypes = ("bf16", "fp16", "fp32")
    strides = ("w",) if strided else ()
    return Case("quantize_rows", name, lambda draw: {"w": draw.low(n, k)}, quantized, (), exactly, dtypes, strides)


def layer_norm(o: Operands) -> Outputs:
    return {"y": kernels.layer_norm(o["x"], o["gamma"], o["beta"], EPS)}


def layer_norm_case(name: str, lead: tuple[int, ...], width: int) -> Case:
    def make(draw: Draw) -> Operands:
        return {"x": draw.low(*lead, width), "gamma": draw.learned(width, mean=1.0), "beta": draw.learned(width)}

    return Case("layer_norm", name, make, layer_norm, ("x", "gamma", "beta"), bitwise=False)


OTHERS = [
    substitute_case("two modalities", 2, 32, 256),
    substitute_case("three, odd, not stopped", 3, 17, 37, stop=False),
    substitute_case("one sample", 2, 1, 256),
    substitute_case("no samples", 2, 0, 256),
    quantize_case("aligned", 150, 768),
    quantize_case("odd, strided", 37, 51, strided=True),
    quantize_case("no rows", 0, 64),
    layer_norm_case("aligned", (2, 65), 256),
    layer_norm_case("no rows", (0, 5), 256),
]
