"""Operands of lora_linear and linear_lowrank, and what both should give: the formulas written out in plain PyTorch.

Data has a non-zero mean: an unmasked tail or a forgotten term hides behind zero-mean data.
"""

from dataclasses import dataclass

import torch
from running import CPU, on
from tolerance import assert_as_exact_as

SCALING, DROPOUT, SEED = 0.7, 0.3, 5


@dataclass(frozen=True)
class Case:
    lead: tuple = (37,)  # shape of the rows
    k: int = 40
    n: int = 24
    r: int | None = 6  # None: no adapter
    groups: int = 1
    wide: int = 1  # the first group is that many times as wide as each other: `lead` of the ops
    bias: bool = True
    weight: str = "float"  # or "int8", or "w8a8": int8 with the input quantised too
    dropout: float = 0.0
    scaling: float = SCALING
    strided: bool = False  # x is a view of every other column


CASES = {
    "one projection, rank 1": Case(r=1),
    "q, k, v": Case(lead=(2, 19), k=72, n=96, groups=3),
    "q twice as wide": Case(lead=(2, 19), k=72, n=96, groups=3, wide=2),
    "q three times as wide, odd sizes": Case(lead=(7, 5), k=37, n=85, groups=3, wide=3),
    "one wide group": Case(n=32, wide=2),
    "wide q, several tiles and rank steps": Case(lead=(150,), k=200, n=540, r=70, groups=2, wide=2),
    "nothing of the adapter, q, k, v of rank 24": Case(n=96, r=24, groups=3, scaling=0.0),
    "rank 24, no bias": Case(k=64, n=48, r=24, bias=False),
    "rank 64": Case(k=64, n=48, r=64),
    "nothing of the adapter, rank 40": Case(n=96, r=40, scaling=0.0),
    "several tiles and rank steps": Case(lead=(150,), k=200, n=540, r=70, groups=2),
    "sizes that divide nothing": Case(lead=(7, 5), k=37, n=51, groups=3),
    "no rows": Case(lead=(0, 5)),
    "no rows of q, k, v": Case(lead=(0,), groups=3),
    "no rows of wide q": Case(lead=(0,), n=32, groups=3, wide=2),
    "no inputs": Case(lead=(2, 3), k=0, groups=3),
    "no outputs": Case(lead=(2, 3), n=0, groups=3, r=24),
    "no adapter": Case(r=None),
    "strided": Case(strided=True),
    "dropout": Case(lead=(3, 30), k=72, n=96, groups=3, dropout=DROPOUT),
    "int8": Case(lead=(2, 19), k=72, n=96, groups=3, weight="int8"),
    "int8, dropout": Case(weight="int8", dropout=DROPOUT, groups=2),
    "int8, several tiles": Case(lead=(150,), k=200, n=260, weight="int8"),
    "int8, wide q": Case(lead=(2, 19), k=72, n=96, groups=2, wide=3, weight="int8"),
    "w8a8, wide q, dropout": Case(lead=(2, 19), k=72, n=96, groups=3, wide=2, weight="w8a8", dropout=DROPOUT),
    "w8a8": Case(lead=(2, 19), k=72, n=96, groups=3, weight="w8a8"),
    "w8a8, no adapter, odd sizes": Case(k=37, n=51, r=None, weight="w8a8"),
    "w8a8, no rows": Case(lead=(0,), weight="w8a8"),
}


def operands(case: Case, dtype: torch.dtype, seed: int = 0) -> dict:
    """x in `dtype`, a frozen weight in `dtype` or int8, what trains in fp32 (fp64 for fp64) and requiring gradients."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, mean=0.0, std=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std + mean

    x = draw(*case.lead, case.k * (1 + case.strided), mean=0.5).to(dtype)
    x = x[..., :: 1 + case.strided].requires_grad_()
    weight, scale = draw(case.n, case.k, std=max(1, case.k) ** -0.5).to(dtype), None
    if case.weight != "float":
        scale = weight.float().abs().amax(1) / 127
        weight = (weight.float() / scale[:, None]).round().to(torch.int8)
    a = b = None
    if case.r is not None:
        a = draw(case.groups * case.r, case.k, mean=0.1, std=max(1, case.k) ** -0.5).to(wide).requires_grad_()
        b = draw(case.n, case.r, mean=0.1).to(wide).requires_grad_()
    return {
        "x": x,
        "weight": weight,
        "bias": draw(case.n).to(wide).requires_grad_() if case.bias else None,
        "lora_a": a,
        "lora_b": b,
        "scaling": case.scaling,
        "weight_scale": scale,
        "groups": case.groups,
        "lead": case.wide,
        "dropout": case.dropout,
        "seed": SEED,
        "quantize_input": case.weight == "w8a8",
    }


def gradient_of(y: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return (torch.randn(y.shape, generator=g, dtype=torch.float64) + 0.5).to(y.dtype)


def with_gradients(function, given: dict, dy=None) -> dict:
    """{"y": ..., "d x": ..., ...}: the result of function(**given) and the gradient of every leaf that asks for one."""
    y = function(**given)
    leaves = {n: t for n, t in given.items() if torch.is_tensor(t) and t.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), gradient_of(y) if dy is None else dy.to(y.dtype))
    return {"y": y.detach()} | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def lowrank_operands(case: Case, dtype: torch.dtype) -> dict:
    """The operands of linear_lowrank: those of lora_linear with S [..., groups * r] drawn in place of A."""
    given = operands(case, dtype)
    s = torch.randn(*case.lead, case.groups * case.r, generator=torch.Generator().manual_seed(2)) + 0.5
    given = {"h" if n == "x" else n: t for n, t in given.items() if n not in ("lora_a", "dropout", "seed")}
    return given | {"s": s.to(dtype).requires_grad_()}


def written_out(given: dict, dtype: torch.dtype, kept: torch.Tensor | None = None, device: torch.device = CPU) -> dict:
    """Result and gradients of the formula in `dtype` throughout; `kept` is the dropout mask [..., K]."""
    low = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) if _floats(t) else t for n, t in given.items()}
    rest = {} if "s" in given else {"kept": kept}
    formula = on(device, _linear_lowrank if "s" in given else _lora_linear)
    x = given.get("x", given.get("h"))
    return with_gradients(
        lambda **leaves: formula(**leaves, **rest),
        low,
        gradient_of(x.new_empty(*x.shape[:-1], given["weight"].shape[0])),
    )


def _floats(t) -> bool:
    return torch.is_tensor(t) and t.is_floating_point()


def _frozen(x, weight, bias, weight_scale, quantize_input):
    rows, w = x, weight.to(x.dtype)
    if weight_scale is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        w = (weight.to(wide) * weight_scale.to(wide)[:, None]).to(x.dtype)
    if quantize_input:  # differentiated as if the rows were not rounded
        step = x.detach().float().abs().amax(-1, keepdim=True) / 127
        rounded = ((x.detach().float() / step).round() * step).to(x.dtype)
        rows = x + (rounded - x).detach()
    return rows @ w.t() + (0 if bias is None else bias)


def _linear_lowrank(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input):
    """Group by group: the first has `lead` of the equal blocks of B, each other one."""
    first, *others = s.chunk(groups, -1)
    blocks = lora_b.chunk(groups + lead - 1)
    low = [first @ torch.cat(blocks[:lead]).t()]
    low += [part @ b.t() for part, b in zip(others, blocks[lead:], strict=True)]
    return _frozen(h, weight, bias, weight_scale, quantize_input) + scaling * torch.cat(low, -1)


def _lora_linear(
    x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, dropout, seed, quantize_input, kept
):
    if lora_a is None:
        return _frozen(x, weight, bias, weight_scale, quantize_input)
    s = (x if kept is None else torch.where(kept, x / (1 - dropout), 0)) @ lora_a.t()
    return _linear_lowrank(x, weight, bias, s, lora_b, scaling, weight_scale, groups, lead, quantize_input)


def assert_right(got: dict, given: dict, dtype: torch.dtype, kept=None, device: torch.device = CPU):
    """Forward within twice and gradients within three times what plain PyTorch loses in `dtype` on `device`."""
    exact, plain = written_out(given, torch.float64, kept), written_out(given, dtype, kept, device)
    assert got.keys() == exact.keys()
    for name in exact:
        assert_as_exact_as(got[name], plain[name], exact[name], 2 if name == "y" else 3, name, device)
