"""The frozen linear that carries low-rank adapters, one for each of its roles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from . import kernels
from .kernels.nf4 import NF4_BLOCK
from .kernels.norm_joined import ROOM, joined_weight
from .lora_config import LoraConfig
from .quantization import storage_of


def _lead(roles: tuple[str, ...], widths: tuple[int, ...], rows: int) -> int:
    """How many times as wide as each other role the first is."""
    first, width = widths[0], widths[-1]
    alike = len(widths) == len(roles) and sum(widths) == rows and set(widths[1:]) <= {width}
    if not alike or width < 1 or first < width or first % width:
        raise ValueError(
            f"widths of {', '.join(roles)} must be equal, the first perhaps a multiple of the others, and make up the "
            f"weight's {rows} rows, not {', '.join(map(str, widths))}"
        )
    return first // width


class LoraLinear(nn.Module):
    """One or several frozen linears of equal input as one product, with an optional low-rank path for each.

    Args:
        weight: `[N, K]`, the linears of `roles` stacked along N; kept by reference, frozen.
        bias: `[N]` or None.
        roles: one name per block, for example `("q", "k", "v")`.
        weight_scale: `[N]` fp32, where the weight is int8.
        widths: rows of each role; None: all alike. The first may be a multiple of the others: q has more heads than k
            and v where several of its heads share theirs (grouped-query attention).

    Raises:
        ValueError: other widths.

    `forward` maps `[..., K]` to `[..., N]`. After `add_adapter`, `lora_a` is `[groups * r, K]` and `lora_b` `[N', r]`
    over the adapted roles only, fp32.

    >>> linear = LoraLinear(torch.ones(8, 2), None, ("q", "k", "v"), widths=(4, 2, 2))
    >>> linear(torch.ones(1, 2)).shape, linear.lead
    (torch.Size([1, 8]), 2)
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        roles: tuple[str, ...],
        weight_scale: torch.Tensor | None = None,
        widths: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.roles = roles
        self.out_features, self.in_features = weight.shape
        self.widths = tuple(widths or (self.out_features // len(roles),) * len(roles))
        self.lead = _lead(roles, self.widths, self.out_features)
        self.register_parameter("weight_scale", None)
        self.store(weight, weight_scale)
        # A clone, because a bias may train (BitFit) and the caller's model must not change.
        own_bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", own_bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.adapted: tuple[str, ...] = ()
        self.scaling = 1.0
        self.dropout = 0.0
        self.adapter_enabled = True
        self.quantize_input = False
        self.joined: torch.Tensor | None = None  # see `join`

    @property
    def storage(self) -> str:
        """`"float"`, `"int8"` or `"nf4"`."""
        return storage_of(self.weight)

    def rows_of(self, role: str) -> slice:
        """The rows of the weight, and of the output, that are `role`'s."""
        place = self.roles.index(role)
        first = sum(self.widths[:place])
        return slice(first, first + self.widths[place])

    def widths_of(self, roles: Iterable[str]) -> list[int]:
        """How many rows of the weight, and outputs, each of `roles` has."""
        return [self.widths[self.roles.index(role)] for role in roles]

    def store(self, weight: torch.Tensor, weight_scale: torch.Tensor | None) -> None:
        """Replace the frozen weight by the same one stored in another way (see quantization.py)."""
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.weight_scale = None if weight_scale is None else nn.Parameter(weight_scale.detach(), requires_grad=False)

    def join(self) -> None:
        """Keep the weight where it has room beside it, and B is multiplied together with it (kernels/norm_joined.py).

        Nothing changes but its strides, which is too much for FSDP: `capture` asks for it, and moving undoes it.
        """
        fits = self.storage == "float" and self.in_features % ROOM == 0 and self.dropout == 0
        if fits and self.lora_a is not None and self.adapted == self.roles:
            self.joined = joined_weight(self.weight.detach(), self.lora_a.shape[0])
            self.weight.data = self.joined[:, : self.in_features]

    def _apply(self, fn: Callable, recurse: bool = True) -> LoraLinear:
        """As in `nn.Module`, but scales move without changing their dtype: rounded, they would be other weights."""
        self.joined = None
        exact = None if self.weight_scale is None else self.weight_scale.detach()
        super()._apply(fn, recurse)
        moved = self.weight_scale
        if exact is not None and moved is not None and moved.dtype != exact.dtype:
            moved.data = exact.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes: the weight by itself, without the room that it lies in here."""
        return self.__dict__ | {"joined": None}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        given, errors = state_dict.get(prefix + "weight"), rest[-1]
        if given is not None and storage_of(given) != self.storage:
            errors.append(
                f"{prefix}weight is stored as {storage_of(given)} in the file and as {self.storage} in this model: "
                "build the model with the quantization that the file was saved with"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def add_adapter(self, config: LoraConfig) -> None:
        """Give every role of `config.target_modules` its factors: A uniform as in PEFT, B zero."""
        self.remove_adapter()
        self.adapted = tuple(role for role in self.roles if config.adapts(role))
        if not self.adapted:
            return
        rows, width = sum(self.widths_of(self.adapted)), self.in_features
        groups, device = len(self.adapted), self.weight.device
        bound = 1 / math.sqrt(width)  # kaiming_uniform_ with a = sqrt(5), as nn.Linear and PEFT do
        self.lora_a = nn.Parameter(torch.empty(groups * config.r, width, device=device).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(rows, config.r, device=device))
        self.scaling, self.dropout = config.scaling, config.lora_dropout

    def remove_adapter(self) -> None:
        self.lora_a = self.lora_b = self.joined = None
        self.adapted = ()

    @property
    def has_adapter(self) -> bool:
        return self.lora_a is not None and self.adapter_enabled

    def factors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`lora_a [G * r, K]` and `lora_b [N, r]` over all G roles: zero blocks for those without an adapter."""
        if not self.has_adapter:
            return None, None
        if self.adapted == self.roles:
            return self.lora_a, self.lora_b
        rank, each = self.lora_b.shape[1], zip(self.roles, self.widths, strict=True)
        a = dict(zip(self.adapted, self.lora_a.split(rank), strict=True))
        b = dict(zip(self.adapted, self.lora_b.split(self.widths_of(self.adapted)), strict=True))
        zero_a = torch.zeros_like(self.lora_a[:rank])
        return (
            torch.cat([a.get(role, zero_a) for role in self.roles]),
            torch.cat([b[role] if role in b else self.lora_b.new_zeros(width, rank) for role, width in each]),
        )

    @property
    def lora_before_dropout(self) -> torch.Tensor | None:
        """`lora_a` for the pass that normalises and projects at once; None without an adapter or with dropout."""
        if self.is_watched:
            return None
        return None if self.training and self.dropout > 0 else self.factors()[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lora_a, lora_b = self.factors()
        dropout = self.dropout if self.training and lora_a is not None else 0.0
        if self.storage == "nf4":
            return self._nf4(x, lora_a=lora_a, lora_b=lora_b, dropout=dropout)
        return kernels.lora_linear(
            x,
            self.weight,
            self.bias,
            lora_a,
            lora_b,
            self.scaling,
            weight_scale=self.weight_scale,
            groups=len(self.roles),
            lead=self.lead,
            dropout=dropout,
            quantize_input=self.quantize_input,
        )

    @property
    def is_watched(self) -> bool:
        """Whether somebody has hooked it or parametrised it: then it is called as a module, with its own input."""
        own = vars(self)  # attributes of a module are slow to read
        backward = own["_backward_hooks"] or own["_backward_pre_hooks"]
        return bool(own["_modules"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or backward)

    @property
    def is_splittable(self) -> bool:
        """Whether `split_after_norm` can take it apart: 4-bit weights only where no block of them spans q and k."""
        if self.is_watched:
            return False
        if self.dropout > 0 and self.training:
            return False
        return self.storage != "nf4" or self.widths[0] * self.in_features % NF4_BLOCK == 0

    def operands(self) -> kernels.Linear | None:
        """What `kernels.transformer_block` takes of it; None where dropout draws a mask or the weight is 4-bit."""
        if self.is_watched:
            return None
        own = vars(self)
        parameters, roles = own["_parameters"], own["roles"]
        weight = parameters["weight"]
        if weight.dtype == torch.uint8 or weight.requires_grad or (own["dropout"] > 0 and own["training"]):
            return None
        a, b = parameters["lora_a"], parameters["lora_b"]
        if a is not None and not (own["adapter_enabled"] and own["adapted"] == roles):
            a, b = self.factors()
        joined = own["joined"]
        if joined is not None and (a is None or not self._holds_weight()):
            joined = None
        options = own["scaling"], len(roles), own["lead"], own["quantize_input"], joined
        return kernels.Linear(weight, parameters["bias"], a, b, parameters["weight_scale"], *options)

    def _holds_weight(self) -> bool:
        """Whether `joined` still is where the weight lies: another one may have been stored or assigned."""
        return self.joined is not None and self.joined.data_ptr() == self.weight.data_ptr()

    def after_norm(
        self, norm: kernels.Norm, x: torch.Tensor, **learned: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward(norm(rows))`, and the rows for the residual: x `[B, S, D]`, joined with `learned` rows.

        Args:
            learned: `suffix`, `present` and `mask_token` of `kernels.assemble_norm_project`.
        """
        dropped = self.has_adapter and self.training and self.dropout > 0
        joined = any(rows is not None for rows in learned.values())
        if not (dropped or joined or self.storage == "nf4" or self.is_watched):
            return kernels.norm_linear(
                x,
                *norm[:3],
                self.weight,
                self.bias,
                *self.factors(),
                self.scaling,
                weight_scale=self.weight_scale,
                groups=len(self.roles),
                lead=self.lead,
                quantize_input=self.quantize_input,
                rms=norm.rms,
            )
        h, s, rows = kernels.assemble_norm_project(
            tokens=x,
            **learned,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            rms=norm.rms,
            lora_a=self.lora_before_dropout,
            quantize=self.quantize_input and not (dropped or self.is_watched),  # these need the input itself
        )
        return self.forward_projected(h, s), rows

    def split_after_norm(
        self, norm: kernels.Norm, x: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of q, k, v: q of the rows at `places` `[R]` alone, k and v of all rows, and the rows at `places` of x.

        x `[B, T, D]` -> `[1, R, Q]`, `[B, T, N - Q]`, `[1, R, D]`: Q is the width of q.
        """
        lora_a, lora_b = self.factors()
        options = {
            "norm_weight": norm.weight,
            "norm_bias": norm.bias,
            "eps": norm.eps,
            "rms": norm.rms,
            "lora_a": lora_a,
        }
        h, s, rows = kernels.assemble_norm_project(tokens=x, **options)
        width, rank = self.widths[0], 0 if lora_b is None else lora_b.shape[1]

        def part(h: torch.Tensor, s: torch.Tensor | None, of: slice, groups: int) -> torch.Tensor:
            weight, scale = self._stored(of)
            bias, b = (None if t is None else t[of] for t in (self.bias, lora_b))
            if self.storage == "nf4":
                shape = (of.stop - of.start, self.in_features)
                return kernels.nf4_linear(
                    h, weight, scale, shape, bias, s, None, b, scaling=self.scaling, groups=groups
                )
            given = (h, weight, bias, s, b, self.scaling, scale)
            return kernels.linear_lowrank(*given, groups=groups, quantize_input=self.quantize_input)

        def at_places(t: torch.Tensor) -> torch.Tensor:
            return t.reshape(-1, t.shape[2]).index_select(0, places)[None]

        s_q, s_kv = (None, None) if s is None else (at_places(s)[..., :rank], s[..., rank:])
        q = part(at_places(h), s_q, slice(0, width), 1)
        return q, part(h, s_kv, slice(width, self.out_features), 2), at_places(rows)

    def _stored(self, of: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows `of` of the frozen weight as they are stored, and their scales."""
        weight, scale = self.weight, self.weight_scale
        if scale is None or self.storage != "nf4":
            return weight[of], None if scale is None else scale[of]
        first, last = of.start * self.in_features, of.stop * self.in_features
        return weight[first // 2 : last // 2], scale[first // NF4_BLOCK : last // NF4_BLOCK]

    def forward_projected(self, x: torch.Tensor | kernels.QuantizedRows, s: torch.Tensor | None) -> torch.Tensor:
        """The same with `s = x A^T` [..., G * r] already computed by the pass that wrote `x`."""
        if s is None and torch.is_tensor(x):
            return self(x)
        if self.storage == "nf4":
            return self._nf4(x, s=s, lora_b=self.factors()[1])
        return kernels.linear_lowrank(
            x,
            self.weight,
            self.bias,
            s,
            self.factors()[1],
            self.scaling,
            weight_scale=self.weight_scale,
            groups=len(self.roles),
            lead=self.lead,
            quantize_input=self.quantize_input,
        )

    def _nf4(self, x: torch.Tensor, **low_rank: Any) -> torch.Tensor:
        stored = (self.weight, self.weight_scale, (self.out_features, self.in_features), self.bias)
        options = {"scaling": self.scaling, "groups": len(self.roles), "lead": self.lead}
        return kernels.nf4_linear(x, *stored, **options, **low_rank)

    def extra_repr(self) -> str:
        adapter = f", r={self.lora_b.shape[1]} on {self.adapted}" if self.lora_a is not None else ""
        stored = self.weight.dtype if self.storage == "float" else self.storage
        return f"{self.in_features} -> {'+'.join(self.roles)} {self.out_features}, {stored}{adapter}"
