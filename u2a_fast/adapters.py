"""What the adapters of an encoder are, role by role: taken out of its linears, put into them, described in a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .lora import LoraLinear
from .lora_config import LoraConfig

if TYPE_CHECKING:
    from .block import Block
    from .encoders import Encoder


@dataclass(frozen=True)
class LowRank:
    """The adapter of one projection, `y += scaling * B A x`: a `[r, K]`, b `[N, r]`."""

    a: Tensor
    b: Tensor
    scaling: float


def adapted_linears(encoder: Encoder) -> dict[str, LoraLinear]:
    """The linears of an encoder that have an adapter, by name."""
    return {name: linear for name, linear in _linears(encoder).items() if linear.lora_a is not None}


def _linears(encoder: Encoder) -> dict[str, LoraLinear]:
    return {name: module for name, module in encoder.named_modules() if isinstance(module, LoraLinear)}


def linear_of(block: Block, role: str) -> LoraLinear:
    """The linear of a block that plays a role, perhaps beside others."""
    return next(linear for linear in block.linears if role in linear.roles)


def low_ranks(linear: LoraLinear) -> dict[str, LowRank]:
    """The adapters of a linear by role; none for roles without."""
    if linear.lora_a is None:
        return {}
    sizes = linear.widths_of(linear.adapted)
    parts = zip(linear.lora_a.detach().chunk(len(sizes)), linear.lora_b.detach().split(sizes), strict=True)
    return {role: LowRank(a, b, linear.scaling) for role, (a, b) in zip(linear.adapted, parts, strict=True)}


def set_low_ranks(linear: LoraLinear, given: Mapping[str, LowRank], dropout: float = 0.0) -> None:
    """Give a linear the adapters in `given`, by role, in place of those that it has.

    Its roles share one rank and one scaling. Ranks that differ are filled up with zeros to the largest, which is exact,
    and the zeros get no gradient. Where scalings differ, each B takes its own in and the common scaling is 1: the same
    function, though an optimiser's step in B then has another size than it would have in PEFT.
    """
    linear.remove_adapter()
    adapted = tuple(role for role in linear.roles if role in given)
    if not adapted:
        return
    chosen = [given[role] for role in adapted]
    rank, scalings = max(part.a.shape[0] for part in chosen), {part.scaling for part in chosen}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    own = [part.b if part.scaling == scaling else part.b * (part.scaling / scaling) for part in chosen]
    a = torch.cat([pad(part.a, (0, 0, 0, rank - part.a.shape[0])) for part in chosen])
    b = torch.cat([pad(part, (0, rank - part.shape[1])) for part in own])
    linear.lora_a, linear.lora_b = (nn.Parameter(factor.to(linear.weight.device)) for factor in (a, b))
    linear.adapted, linear.scaling, linear.dropout = adapted, scaling, dropout


def describe_adapters(encoder: Encoder) -> dict[str, dict[str, Any]]:
    """What the state of an encoder does not say of its adapters, for a config: `{linear: roles, rank, ...}`."""
    return {
        name: {
            "roles": list(linear.adapted),
            "r": linear.lora_b.shape[1],
            "scaling": linear.scaling,
            "dropout": linear.dropout,
        }
        for name, linear in adapted_linears(encoder).items()
    }


def restore_adapters(encoder: Encoder, described: Mapping[str, Any]) -> None:
    """Adapters as `describe_adapters` has described them, whose values are still to be loaded.

    Raises:
        ValueError: the description does not fit the encoder, or is damaged.
    """
    linears = _linears(encoder)
    if unknown := sorted(set(described) - set(linears)):
        raise ValueError(f"the config describes adapters of {unknown[0]}, which this encoder does not have")
    for name, linear in linears.items():
        if name not in described:
            linear.remove_adapter()
            continue
        try:
            _restore(linear, described[name])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the config describes the adapter of {name} as {described[name]!r}: {error}") from error


def _restore(linear: LoraLinear, entry: Mapping[str, Any]) -> None:
    if foreign := set(entry["roles"]) - set(linear.roles):
        raise ValueError(f"its roles are {', '.join(linear.roles)}, not {foreign.pop()!r}")
    if not math.isfinite(entry["scaling"]):
        raise ValueError("its scaling must be a finite number")
    options = {"r": entry["r"], "lora_dropout": entry["dropout"], "target_modules": entry["roles"]}
    linear.add_adapter(LoraConfig(**options))
    linear.scaling = entry["scaling"]
