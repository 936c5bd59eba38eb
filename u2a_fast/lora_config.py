"""Which linears get low-rank adapters, by role, and of what rank: ours and PEFT's way of saying so."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

ROLES = ("q", "k", "v", "o", "fc1", "fc2")  # of every block; fc1 of a gated MLP is GATED side by side
GATED = ("gate", "up")
TARGETS = (*ROLES, *GATED)
ALIASES = {"down": "fc2"}
MOST_RANK = 2**16

# What the projections are called in the encoders we know: PEFT's target names, read as roles.
ROLE_OF_NAME = {
    **dict.fromkeys(("q", "q_proj", "query", "q_lin"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "k_lin"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "v_lin"), "v"),
    **dict.fromkeys(("o", "o_proj", "out_proj", "out_lin", "attention.output.dense"), "o"),
    **dict.fromkeys(("fc1", "intermediate.dense", "intermediate_dense", "lin1"), "fc1"),
    **dict.fromkeys(("fc2", "output_dense", "lin2", "down", "down_proj"), "fc2"),
    **dict.fromkeys(("gate", "gate_proj"), "gate"),
    **dict.fromkeys(("up", "up_proj"), "up"),
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
        target_modules: roles out of q, k, v, o, fc1, fc2, gate, up, down. In an encoder with a gated MLP, fc1 means
            gate and up; down is another name of fc2. Each counts where an encoder has it; one of a model's has to.
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
        names = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        targets = tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))
        object.__setattr__(self, "target_modules", targets)
        unknown = [t for t in targets if t not in TARGETS]
        if unknown or not targets:
            allowed = ", ".join((*TARGETS, *ALIASES))
            raise ValueError(f"target_modules must name roles out of {allowed}, not {unknown or 'nothing'}")
        for name in ("r", "lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not isinstance(self.r, numbers.Integral) or not 1 <= self.r <= MOST_RANK:
            raise ValueError(f"r must be a whole number from 1 to {MOST_RANK}, not {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def adapts(self, role: str) -> bool:
        """Whether a linear of this role gets an adapter.

        >>> LoraConfig(target_modules=("q", "fc1")).adapts("gate")
        True
        """
        return role in self.target_modules or (role in GATED and "fc1" in self.target_modules)

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
            raise ValueError(f"cannot tell the role of target_modules {unknown}: use roles out of {', '.join(TARGETS)}")
        roles = {ROLE_OF_NAME[name] for name in names}
        return cls(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=tuple(role for role in TARGETS if role in roles),
            use_rslora=config.use_rslora,
        )


def read_lora(lora: Any) -> LoraConfig | None:
    """A method's `lora` argument: None, ours, PEFT's, or a dictionary."""
    return None if lora is None else LoraConfig.read(lora)
