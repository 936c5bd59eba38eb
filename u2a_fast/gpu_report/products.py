"""Products of ViT-S, ViT-B and BERT-base in bf16: ours against the library's, as fractions of the library's rate.

library                  F.linear, twice (A/A)
library, K + R'          F.linear over rows [h, S] and weights [W, B], R' = groups * r rounded up to 16
ours                     linear_lowrank: the frozen product and the low-rank one in one launch
layer, ours / library    LayerNorm where there is one, S = h A^T and both products, in Triton and in ATen
layer, joined            the same as the library's product over joined rows and weights, which the pass writes
dX library / ours        dY W, and dY W + G A in one launch

Rates count the operations of the frozen product alone. Which of "ours" and "library, K + R'" wins by 3% or more, and by
more than the noise, goes into the device table in the user's cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import device_table
from ..kernels import Linear, Norm, steps_aten, steps_triton
from ..kernels.linear_backward import launch_input
from ..kernels.linear_lowrank import linear_lowrank_triton
from ..kernels.norm_joined import joined_weight
from .machine import device_name
from .report import Entry, Report, write_json
from .timing import compare, rotating

ROUNDS = 50
ROWS = (2048, 6304, 12608)
RANK, SCALING, WINS = 8, 2.0, 1.03


@dataclass(frozen=True)
class Product:
    model: str
    k: int
    n: int
    groups: int = 1
    adapter: bool = True
    norm: bool = True

    @property
    def ranks(self) -> int:
        return self.groups * RANK if self.adapter else 0


PRODUCTS = (
    Product("ViT-B, BERT-base q, k, v", 768, 2304, 3),
    Product("ViT-B, BERT-base fc1", 768, 3072, adapter=False),
    Product("ViT-B, BERT-base o", 768, 768, norm=False),
    Product("ViT-B, BERT-base fc2", 3072, 768, adapter=False, norm=False),
    Product("ViT-S q, k, v", 384, 1152, 3),
)
DRY = (Product("tiny q, k, v", 32, 96, 3), Product("tiny fc2", 64, 32, adapter=False, norm=False))


def measure(report: Report) -> None:
    won: dict[str, Any] = {}
    for product in DRY if report.dry else PRODUCTS:
        for rows in (48,) if report.dry else ROWS:
            name = f"{product.model}, {rows} x {product.k} -> {product.n}"
            entry = report.measure(name, time_product, product, rows, report.dry)
            if "fraction" in entry:
                won[device_table.entry_of(product.n, product.k, rows)] = winner(entry, product)
    report.measure("device table", write_table, won, report)


def time_product(product: Product, rows: int, dry: bool) -> Entry:
    made = rotating(lambda: operands(product, rows, dry), 2 * (rows + product.n) * product.k, dry)
    arms = {name: [lambda f=f, o=o: f(o) for o in made] for name, f in functions(product, dry).items()}
    timed = compare(arms, "library", 3 if dry else ROUNDS, dry)
    library = {name: "dX library" if name.startswith("dX") else "library" for name in timed["us"]}
    fraction = {name: round(timed["us"][library[name]] / taken, 3) for name, taken in timed["us"].items()}
    rate = 2 * rows * product.k * product.n / timed["us"]["library"] / 1e6
    return {"fraction": fraction, "library_tflops": round(rate, 1), "sets": len(made), **timed}


@dataclass
class Given:
    x: Tensor
    linear: Linear
    norm: Norm
    s: Tensor | None
    joined_x: Tensor
    joined_weight: Tensor
    dy: Tensor


def operands(product: Product, rows: int, dry: bool) -> Given:
    where, k, n, ranks = "cpu" if dry else "cuda", product.k, product.n, product.ranks

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=where, dtype=dtype)

    low = (draw(ranks, k, dtype=torch.float32), draw(n, RANK, dtype=torch.float32)) if ranks else (None, None)
    weight = draw(n, k) * k**-0.5
    joined = joined_weight(weight, ranks)
    linear = Linear(weight, draw(n), *low, None, SCALING, product.groups)
    norm = Norm(draw(k), draw(k), 1e-6) if product.norm else Norm()
    s = draw(rows, ranks) if ranks else None
    return Given(draw(rows, k), linear, norm, s, draw(rows, joined.shape[1]), joined, draw(rows, n))


def functions(product: Product, dry: bool) -> dict[str, Callable[[Given], Any]]:
    found: dict[str, Callable[[Given], Any]] = {
        "library": lambda o: F.linear(o.x, o.linear.weight, o.linear.bias),
        "library, K + R'": lambda o: F.linear(o.joined_x, o.joined_weight, o.linear.bias),
        "layer, library": lambda o: layer(steps_aten, o),
        "dX library": lambda o: o.dy @ o.linear.weight,
    }
    if dry:
        return found | {"ours": lambda o: steps_aten.project(o.x, o.linear)}
    if product.adapter and product.norm:
        found["layer, joined"] = lambda o: layer(steps_triton, with_room(o))
    return found | {
        "ours": ours,
        "layer, ours": lambda o: layer(steps_triton, o),
        "dX ours": lambda o: launch_input(o.dy, o.linear.weight, None, o.s, o.linear.lora_a, 0.0, None),
    }


def layer(steps: ModuleType, o: Given) -> Any:
    if o.norm.weight is None:
        return steps.project(o.x, o.linear)
    return steps.enter_project(o.x, o.norm, o.linear, torch.bfloat16)


def with_room(o: Given) -> Given:
    """The same with the weight where it lies in `joined_weight`."""
    weight = o.joined_weight[:, : o.linear.weight.shape[1]]
    return replace(o, linear=o.linear._replace(weight=weight, joined=o.joined_weight))


def ours(o: Given) -> Tensor:
    weight, bias, _, b, scale, scaling, groups, lead, int8, _ = o.linear
    return linear_lowrank_triton(o.x, weight, bias, o.s, b, scaling, scale, groups, lead, int8, None, None)


# --------------------------------------------------------------------------------------------------- the device table
def winner(entry: Entry, product: Product) -> dict[str, Any]:
    """Which of the two wins, None where the difference is below 3% or within the noise."""
    library = entry["us"]["library, K + R'" if product.adapter else "library"]
    ratio, least = library / entry["us"]["ours"], max(WINS - 1, entry["noise"])
    wins = "own" if ratio > 1 + least else "library" if ratio < 1 / (1 + least) else None
    return {"wins": wins, "library_over_own": round(ratio, 3), "noise": entry["noise"]}


def write_table(won: dict[str, Any], report: Report) -> Entry:
    """Replace what the table says of this device under these versions; a dry run leaves the user's alone."""
    if not won:
        raise RuntimeError("no product was timed")
    path = report.path.parent / "device_table.json" if report.dry else device_table.path()
    key = device_table.key_of(device_name(report.dry))
    table = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table | {key: won})
    return {"key": key, "won": won}
