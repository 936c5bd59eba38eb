"""What every method's model is described by, and what it returns."""

from __future__ import annotations

import inspect
import json
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

MOST_CLASSES = 100_000  # names and a head are made for as many as a file says


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {json.dumps(list(choices))}, not {value!r}")


def check_count(name: str, value: Any, least: int, most: int = 2**16) -> None:
    """Refuse what is no whole number from `least` to `most`; more than that would be a slip, or end in no memory."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not least <= int(value) <= most:
        bound = f"least {least}" if int(value) < least else f"most {most}"
        raise ValueError(f"{name} must be at {bound}, not {value}")


def constructor_arguments(model_class: type) -> list[str]:
    """Names of what a model's constructor takes beside its encoders, what it hands on as `**kwargs` included."""
    names: dict[str, None] = {}
    for owner in model_class.__mro__:
        if "__init__" in vars(owner):
            given = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
            names |= {each.name: None for each in given if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
            if not any(each.kind == each.VAR_KEYWORD for each in given):
                break
    return [name for name in names if name != "encoders"]


class Option:
    """A constructor argument that may change later. It lives in `config.arguments` alone: what is set is what is saved.

    Args:
        accepts: which values are taken.
        rule: what `accepts` says, for the message.
    """

    def __init__(self, accepts: Callable[[Any], bool], rule: str):
        self.accepts, self.rule = accepts, rule

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        return self if model is None else model.config.arguments[self.name]

    def __set__(self, model: Any, value: Any) -> None:
        self.check(value)
        model.config.arguments[self.name] = value

    def check(self, value: Any) -> None:
        try:
            accepted = self.accepts(value)
        except TypeError:  # it does not compare with a number
            accepted = False
        if not accepted:
            raise ValueError(f"{self.name} must be {self.rule}, not {value!r}")


class MultimodalConfig(PreTrainedConfig):
    """Config of a multimodal model: the constructor's arguments, and where the encoders come from.

    `modalities` is a list because `config.json` sorts the keys of a dictionary and their order has a meaning.
    """

    keys_to_ignore_at_inference = ["task_loss", "align_loss"]
    adapters = dict[str, Any]()  # by modality, of those that `load_adapter` brought; never changed in place
    quantized_from = dict[str, str]()  # by modality, the dtype its linears had before; `to` changes that of the others
    label_scale: Mapping[str, Any] | None = None  # of the labels that the head still answers in standard units of

    def __init__(
        self,
        modalities: Sequence[str] = (),
        encoders: Mapping[str, str] | None = None,
        encoder_dtypes: Mapping[str, str] | None = None,
        encoders_in_8bit: Sequence[str] = (),
        fingerprints: Mapping[str, str] | None = None,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.modalities = list(modalities)
        self.encoders = dict(encoders or {})
        self.encoder_dtypes = dict(encoder_dtypes or {})
        self.encoders_in_8bit = list(encoders_in_8bit)  # quantised by bitsandbytes, whose rounding is not quite ours
        self.fingerprints = dict(fingerprints or {})  # of the encoders as they came, before anything trained
        self.arguments = dict(arguments or {})
        super().__init__(**kwargs)


@dataclass
class MultimodalOutput(ModelOutput):
    """`loss` = task loss + weighted `align_loss`; `logits` [B, C]. The losses are None without labels."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    task_loss: torch.Tensor | None = None
    align_loss: torch.Tensor | None = None
