"""Low-rank adapters by role: the configuration, and the frozen linear that carries one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import kernels
from .kernels.nf4 import NF4_BLOCK
from .kernels.norm_joined import ROOM, joined_weight
from .quantization import storage_of

ROLES = ("q", "k", "v", "o", "fc1", "fc2")

# What the projections are called in the encoders we know: PEFT's target names, read as roles.
ROLE_OF_NAME = {
    **dict.fromkeys(("q", "q_proj", "query", "q_lin"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "k_lin"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "v_lin"), "v"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin", "attention.output.dense"), "o"),
    **dict.fromkeys(("fc1", "intermediate.dense", "intermediate_dense", "lin1"), "fc1"),
    **dict.fromkeys(("fc2", "output_dense", "lin2"), "fc2"),
}

PEFT_READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
PEFT_WITHOUT_EFFECT = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "qalora_group_size"),
)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of frozen linears, `y = W x + b + (lora_alpha / r) B A x` (Hu et al., arXiv 2106.09685).

    Args:
        r: rank; `A` is `[r, in]`, `B` is `[out, r]`. The defaults `r=4, lora_alpha=8` are ours.
        lora_alpha: the scaling is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout: dropout on the input of the low-rank path, while training.
        target_modules: roles out of q, k, v, o, fc1, fc2.
        use_rslora: rank-stabilised scaling.

    Raises:
        ValueError: an unknown role, a rank below 1, or a dropout outside [0, 1).

    >>> LoraConfig(r=4, lora_alpha=8).scaling
    2.0
    """

    r: int = 4
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q", "k", "v", "o")
    use_rslora: bool = False

    def __post_init__(self) -> None:
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        object.__setattr__(self, "target_modules", targets)
        unknown = [t for t in targets if t not in ROLES]
        if unknown or not targets:
            raise ValueError(f"target_modules must name roles out of {', '.join(ROLES)}, not {unknown or 'nothing'}")
        if self.r < 1 or self.r != int(self.r):
            raise ValueError(f"r must be a whole number of at least 1, not {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def read(cls, config: Any) -> LoraConfig:
        """A `LoraConfig` from ours, from a dictionary of its fields, or from PEFT's.

        Raises:
            ValueError: PEFT's config asks for something our linears do not compute (DoRA, trained biases, ...).
            TypeError: anything else was given.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, dict):
            return cls(**config)
        if type(config).__name__ == "LoraConfig" and hasattr(config, "peft_type"):
            return cls._read_peft(config)
        raise TypeError(f"lora must be a u2a_fast.LoraConfig, PEFT's LoraConfig or a dict, not {type(config).__name__}")

    @classmethod
    def _read_peft(cls, config: Any) -> LoraConfig:
        default = type(config)()
        empty: tuple = ([], {})
        given = {name: value for name, value in vars(config).items() if name not in PEFT_READ + PEFT_WITHOUT_EFFECT}
        asked = [name for name, value in given.items() if value != getattr(default, name) and value not in empty]
        if asked:
            raise ValueError(f"PEFT's LoraConfig asks for {', '.join(asked)}, which u2a_fast does not compute")
        names = config.target_modules or ("q", "k", "v", "o")
        names = ROLES if names == "all-linear" else sorted([names] if isinstance(names, str) else names)
        unknown = [name for name in names if name not in ROLE_OF_NAME]
        if unknown:
            raise ValueError(f"cannot tell the role of target_modules {unknown}: use roles out of {', '.join(ROLES)}")
        roles = {ROLE_OF_NAME[name] for name in names}
        return cls(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=tuple(role for role in ROLES if role in roles),
            use_rslora=config.use_rslora,
        )


class LoraLinear(nn.Module):
    """One or several frozen linears of equal input as one product, with an optional low-rank path for each.

    Args:
        weight: `[N, K]`, the linears of `roles` stacked along N in equal blocks; kept by reference, frozen.
        bias: `[N]` or None.
        roles: one name per block, for example `("q", "k", "v")`.
        weight_scale: `[N]` fp32, where the weight is int8.

    `forward` maps `[..., K]` to `[..., N]`. After `add_adapter`, `lora_a` is `[groups * r, K]` and `lora_b` `[N', r]`
    over the adapted roles only, fp32.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        roles: tuple[str, ...],
        weight_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        self.roles = roles
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight_scale", None)
        self.store(weight, weight_scale)
        # A clone, because a bias may train (BitFit) and the caller's model must not change.
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
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
        self.adapted = tuple(role for role in self.roles if role in config.target_modules)
        if not self.adapted:
            return self.remove_adapter()
        rows, width = self.out_features // len(self.roles), self.in_features
        groups, device = len(self.adapted), self.weight.device
        bound = 1 / math.sqrt(width)  # kaiming_uniform_ with a = sqrt(5), as nn.Linear and PEFT do
        self.lora_a = nn.Parameter(torch.empty(groups * config.r, width, device=device).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(groups * rows, config.r, device=device))
        self.scaling, self.dropout = config.scaling, config.lora_dropout

    def remove_adapter(self) -> None:
        self.lora_a = self.lora_b = None
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
        groups = len(self.adapted)
        a = dict(zip(self.adapted, self.lora_a.chunk(groups), strict=True))
        b = dict(zip(self.adapted, self.lora_b.chunk(groups), strict=True))
        zero_a, zero_b = (torch.zeros_like(next(iter(blocks.values()))) for blocks in (a, b))
        return (
            torch.cat([a.get(role, zero_a) for role in self.roles]),
            torch.cat([b.get(role, zero_b) for role in self.roles]),
        )

    @property
    def lora_before_dropout(self) -> torch.Tensor | None:
        """`lora_a` for the pass that normalises and projects at once; None without an adapter or with dropout."""
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
            dropout=dropout,
            quantize_input=self.quantize_input,
        )

    @property
    def is_splittable(self) -> bool:
        """Whether `split_after_norm` can take it apart: 4-bit weights only where no block of them lies across roles."""
        if self.dropout > 0 and self.training:
            return False
        of_role = self.out_features * self.in_features // len(self.roles)
        return self.storage != "nf4" or of_role % NF4_BLOCK == 0

    def operands(self) -> kernels.Linear | None:
        """What `kernels.transformer_block` takes of it; None where dropout draws a mask or the weight is 4-bit."""
        own = self._parameters  # attributes of a module are slow to read, and a block reads twenty
        weight = own["weight"]
        if weight.dtype == torch.uint8 or weight.requires_grad or (self.dropout > 0 and self.training):
            return None
        a, b = own["lora_a"], own["lora_b"]
        if a is not None and not (self.adapter_enabled and self.adapted == self.roles):
            a, b = self.factors()
        joined = self.joined if a is not None and self._holds_weight() else None
        options = self.scaling, len(self.roles), self.quantize_input, joined
        return kernels.Linear(weight, own["bias"], a, b, own["weight_scale"], *options)

    def _holds_weight(self) -> bool:
        """Whether `joined` still is where the weight lies: a copy of this module has another."""
        return self.joined is not None and self.joined.data_ptr() == self.weight.data_ptr()

    def after_norm(
        self, norm: nn.LayerNorm | None, x: torch.Tensor, **learned: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward(norm(rows))`, and the rows for the residual: x `[B, S, D]`, joined with `learned` rows.

        Args:
            learned: `suffix`, `present` and `mask_token` of `kernels.assemble_norm_project`.
        """
        weights = (None, None, 1e-5) if norm is None else (norm.weight, norm.bias, norm.eps)
        dropped = self.has_adapter and self.training and self.dropout > 0
        joined = any(rows is not None for rows in learned.values())
        if not (dropped or joined or self.storage == "nf4"):
            return kernels.norm_linear(
                x,
                *weights,
                self.weight,
                self.bias,
                *self.factors(),
                self.scaling,
                weight_scale=self.weight_scale,
                groups=len(self.roles),
                quantize_input=self.quantize_input,
            )
        h, s, rows = kernels.assemble_norm_project(
            tokens=x,
            **learned,
            norm_weight=weights[0],
            norm_bias=weights[1],
            eps=weights[2],
            lora_a=self.lora_before_dropout,
            quantize=self.quantize_input and not dropped,  # dropout needs the input itself
        )
        return self.forward_projected(h, s), rows

    def split_after_norm(
        self, norm: kernels.Norm, x: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of q, k, v: q of the rows at `places` `[R]` alone, k and v of all rows, and the rows at `places` of x.

        x `[B, T, D]` -> `[1, R, D]`, `[B, T, 2 D]`, `[1, R, D]`.
        """
        lora_a, lora_b = self.factors()
        options = {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps, "lora_a": lora_a}
        h, s, rows = kernels.assemble_norm_project(tokens=x, **options)
        width, rank = self.out_features // 3, 0 if lora_b is None else lora_b.shape[1]

        def part(h: torch.Tensor, s: torch.Tensor | None, of: slice, groups: int) -> torch.Tensor:
            weight, scale = self._stored(of)
            bias, b = (None if t is None else t[of] for t in (self.bias, lora_b))
            if self.storage == "nf4":
                shape = (groups * width, self.in_features)
                return kernels.nf4_linear(
                    h, weight, scale, shape, bias, s, None, b, scaling=self.scaling, groups=groups
                )
            given = (h, weight, bias, s, b, self.scaling, scale)
            return kernels.linear_lowrank(*given, groups=groups, quantize_input=self.quantize_input)

        def at_places(t: torch.Tensor) -> torch.Tensor:
            return t.reshape(-1, t.shape[2]).index_select(0, places)[None]

        s_q, s_kv = (None, None) if s is None else (at_places(s)[..., :rank], s[..., rank:])
        q = part(at_places(h), s_q, slice(0, width), 1)
        return q, part(h, s_kv, slice(width, 3 * width), 2), at_places(rows)

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
            quantize_input=self.quantize_input,
        )

    def _nf4(self, x: torch.Tensor, **low_rank: Any) -> torch.Tensor:
        shape, groups = (self.out_features, self.in_features), len(self.roles)
        stored = (self.weight, self.weight_scale, shape, self.bias)
        return kernels.nf4_linear(x, *stored, scaling=self.scaling, groups=groups, **low_rank)

    def extra_repr(self) -> str:
        adapter = f", r={self.lora_b.shape[1]} on {self.adapted}" if self.lora_a is not None else ""
        stored = self.weight.dtype if self.storage == "float" else self.storage
        return f"{self.in_features} -> {'+'.join(self.roles)} {self.out_features}, {stored}{adapter}"


def read_lora(lora: Any) -> LoraConfig | None:
    """A method's `lora` argument: None, ours, PEFT's, or a dictionary."""
    return None if lora is None else LoraConfig.read(lora)
