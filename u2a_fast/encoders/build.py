"""From a Hugging Face model, hub id or folder to an `Encoder`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..block import Block, Heads
from ..lora import LoraLinear
from ..norms import BlockNorm, RMSNorm
from ..quantization import warn_if_slow
from ..rotary import rotary_of
from .base import Encoder, Family, Origin
from .families import FAMILIES, REFUSED
from .patches import project_by_product

SUPPORTED = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
TOWERS = {
    ("clip", "text"): "CLIPTextModel",
    ("clip", "image"): "CLIPVisionModel",
    ("siglip", "text"): "SiglipTextModel",
    ("siglip", "image"): "SiglipVisionModel",
    ("siglip2", "text"): "Siglip2TextModel",
    ("siglip2", "image"): "Siglip2VisionModel",
}


def from_pretrained_model(model: nn.Module, family: Family | None = None) -> Encoder:
    """A Hugging Face encoder as an `Encoder`; the model given stays as it is, and shares its matrices with it: all but
    q, k and v, and gate and up of a gated MLP, where it has them apart: they become one.

    Args:
        model: a `transformers` encoder without a task head; its pooler is dropped. An `Encoder` is returned as it is.
        family: the spec of a family we do not know (see encoders/families.py for examples).

    Raises:
        ValueError: an unsupported family, a task head on top, two towers at once, PEFT's adapters inside, or a pruned
            model.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> encoder = from_pretrained_model(BertModel(BertConfig(vocab_size=9, **sizes)))
    >>> encoder(input_ids=torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 8])
    """
    if isinstance(model, Encoder):
        return model
    family = _as_named(family, model) if family else family_of(model)
    _refuse_variants(model, family)
    stem = nn.ModuleDict()
    for name, path in family.stem.items():
        if (module := _get(model, path)) is not None:
            stem[name] = project_by_product(_share(module))
    if "final_norm" in stem:
        stem["final_norm"] = _norm(stem["final_norm"], family)
    config, layers = model.config, _get(model, family.layers)
    blocks = [_block(layer, _heads(layer, family, config, i), family, config) for i, layer in enumerate(layers)]
    rotary = nn.ModuleDict()
    if family.rotary is not None:
        for kind in dict.fromkeys(block.heads.rotary for block in blocks if block.heads.rotary):  # as layers have them
            rotary[kind] = rotary_of(_share(_get(model, family.rotary)), config, kind)
    name_or_path = getattr(model, "name_or_path", "") or ""
    encoder = Encoder(family, config, stem, blocks, rotary, name_or_path, origin_of(model, family))
    warn_if_slow(encoder.dtype)
    return encoder.train(model.training)


def origin_of(model: nn.Module, family: Family) -> Origin:
    """The class of a model, and its tensors that an `Encoder` of it does not use; int8 ones in floating point."""
    used = {*family.stem.values(), family.rotary}
    for i in range(len(_get(model, family.layers))):
        used |= {f"{family.layers}.{i}.{path}" for path in (*family.linears, *family.vectors.values())}
    kept = {}
    for owner, module in model.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            full = f"{owner}.{name}" if owner else name
            if tensor is None or any(full == path or full.startswith(f"{path}.") for path in used):
                continue
            kept[full] = (_plain(module).weight if tensor.dtype == torch.int8 else tensor).detach()
    return Origin(type(model), kept)


def without_adapters(encoder: Encoder) -> Encoder:
    """A frozen copy of an encoder without its adapters, for another model; large weights are shared."""
    copied = _share(encoder)
    for block in copied.blocks:
        for linear in block.linears:
            linear.remove_adapter()
    return copied.train(encoder.training)


def load(name_or_path: str, modality: str, **options: Any) -> PreTrainedModel:
    """The Hugging Face encoder of `modality` from a hub id or a folder, without a pooler.

    Of a model with two towers (CLIP, SigLIP) it is the one for the modality; of Whisper it is the encoder.

    Raises:
        ValueError: nothing can be loaded from there, or only by code or pickles of the folder, which are never run.
    """
    from transformers import WhisperModel

    with explained(name_or_path, modality):
        model_class, more = class_for(name_or_path, modality)
        model = model_class.from_pretrained(name_or_path, **more, **options)
        return model.get_encoder() if isinstance(model, WhisperModel) else model


@contextmanager
def explained(name_or_path: str, modality: str) -> Iterator[None]:
    """ValueError in one sentence, whatever transformers makes of a folder or hub id inside."""
    try:
        yield
    except Exception as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if any(Path(name_or_path).glob("pytorch_model*.bin")):
            why = "pytorch_model.bin is not read, since a pickle can run code: save the model again, as safetensors"
        raise ValueError(
            f"the {modality} encoder cannot be loaded from {name_or_path!r}: name another folder or hub id with "
            f"encoders={{{modality!r}: ...}}, on the command line --encoders '{{\"{modality}\": ...}}' ({why})"
        ) from error


def class_for(name_or_path: str, modality: str) -> tuple[Any, dict[str, Any]]:
    """The class of transformers that loads the encoder of `modality`, and the options that it takes."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if config.model_type == "whisper" and config.architectures == ["WhisperEncoder"]:
        return WhisperEncoder, options
    if (tower := TOWERS.get((config.model_type, modality))) is not None:
        return getattr(transformers, tower), options
    model_class = AutoModel._model_mapping.get(type(config), AutoModel)
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    return model_class if isinstance(model_class, type) else AutoModel, options  # of two classes it knows which


WRAPPED = {  # by what only such a wrapper has
    "peft_config": "pass model.merge_and_unload(), or the plain encoder and then load_adapter(folder, modality=...)",
    "_orig_mod": "pass model._orig_mod, and compile what is built of it",
    "device_ids": "pass model.module, and wrap what is built of it",
}


def family_of(model: nn.Module) -> Family:
    """The spec that reads a model; ValueError where there is none."""
    name = type(model).__name__
    known = [family for family in FAMILIES if name in family.classes]
    for family in known:
        if all((getattr(model.config, k) or False) == v for k, v in family.requires.items()):  # None is no
            return _as_named(family, model)
    if known:  # all of which require something
        attribute = next(iter(known[0].requires))
        taken = " or ".join(repr(family.requires[attribute]) for family in known)
        raise ValueError(
            f"{name} with {attribute}={getattr(model.config, attribute)!r} is not supported: our block takes {taken}"
        )
    for wrapped, cure in WRAPPED.items():
        if hasattr(model, wrapped):
            raise ValueError(f"{name} wraps an encoder: {cure}")
    if "For" in name:
        raise ValueError(f"{name} carries a task head: pass the encoder below it, model.base_model")
    if all(hasattr(model, tower) for tower in ("text_model", "vision_model")):
        raise ValueError(f"{name} holds two towers: pass model.text_model or model.vision_model")
    if name == "WhisperModel":
        raise ValueError("WhisperModel holds a decoder too: pass model.get_encoder()")
    if name in REFUSED:
        raise ValueError(f"{name} is not supported: its layers have {REFUSED[name]}, and our block has none")
    raise ValueError(
        f"{name} is not supported: pass one of {SUPPORTED}, or describe it in a u2a_fast.encoders.Family "
        "and call from_pretrained_model(model, family=...)"
    )


# Of each product of a layer, by which roles it may be there: as one linear, or as several.
CHOICES = ((("qkv",), ("q", "k", "v")), (("o",),), (("gate", "up"), ("gate_up",), ("fc1",)), (("fc2",),))


def _as_named(family: Family, model: nn.Module) -> Family:
    """The spec with the linears that this model has, by the names that this version of transformers gives them."""
    layers = _get(model, family.layers)
    if not layers:
        return family

    def found(role: str) -> str | None:
        return next((path for path in family.paths(role) if _get(layers[0], path) is not None), None)

    roles: set[str] = set()
    for choice in CHOICES:
        named = [option for option in choice if all(role in family.roles for role in option)]
        if not named:
            wanted = " or ".join(", ".join(option) for option in choice)
            raise ValueError(
                f"roles of the family {family.name} must name {wanted}, not just {', '.join(family.roles)}"
            )
        roles.update(next((option for option in named if all(map(found, option))), named[0]))
    first = {role: family.paths(role)[0] for role in family.roles}
    return replace(family, roles={role: found(role) or first[role] for role in first if role in roles})


def _refuse_variants(model: nn.Module, family: Family) -> None:
    config, name = model.config, type(model).__name__
    unknown = {"is_decoder": "decoder attention", "add_adapter": "a convolutional adapter"}
    unknown |= {"adapter_attn_dim": "attention adapters", **family.refuses}
    for attribute, what in unknown.items():
        if getattr(config, attribute, None):
            raise ValueError(f"{name} with {attribute} ({what}) is not supported: our block has no such part")
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", "rotary"):
        raise ValueError(f"{name} with relative positions is not supported: our block takes absolute and rotary ones")
    told = [config, *(model.modules() if family.rotary else ())]  # CLIP's layers are told in each call
    if family.causal and not all(getattr(part, "is_causal", True) for part in told):
        raise ValueError(
            f"{name} with is_causal=False sees both ways, and a {family.name} encoder looks back only: set it to True, "
            "or describe the model in a u2a_fast.encoders.Family with causal=False"
        )
    layers = _get(model, family.layers)
    if layers is None or len(layers) == 0:
        raise ValueError(f"{name} has no layers under {family.layers!r}: its family spec does not fit")
    for i, layer in enumerate(layers):
        _refuse_layer(layer, f"layer {i} of {name}", family, config)


def _refuse_layer(layer: nn.Module, name: str, family: Family, config: Any) -> None:
    linears = {role: _get(layer, family.path(role)) for role in family.roles}
    paths = (*map(family.path, family.roles), *family.norms, *(family.update_norms or ()), *(family.head_norms or ()))
    unknown = [path for path in paths if _get(layer, path) is None]
    if unknown:
        raise ValueError(f"{name} has no {unknown[0]!r}: its family spec does not fit this version of transformers")
    if any(hasattr(linear, "base_layer") for linear in linears.values()):
        raise ValueError(
            f"{name} carries adapters of PEFT: merge them (merge_and_unload), or pass the model without them"
        )
    heads, key_heads = _head_counts(family, config)
    width = getattr(config, "head_dim", None) or linears["o"].out_features // heads
    rows = sum(linears[role].out_features for role in ("q", "k", "v", "qkv") if role in linears)
    expected = (heads + 2 * key_heads) * width
    if heads % key_heads or linears["o"].in_features != heads * width or rows != expected:
        raise ValueError(
            f"{name} has {rows} query, key and value features, where {heads} heads of {width}, {key_heads} of them "
            f"with keys, make {expected}: pruned models are not supported"
        )


def _head_counts(family: Family, config: Any) -> tuple[int, int]:
    """Query and key heads of every layer."""
    heads = getattr(config, family.heads)
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _heads(layer: nn.Module, family: Family, config: Any, index: int) -> Heads:
    kinds = getattr(config, "layer_types", None)
    return Heads(
        *_head_counts(family, config),
        causal=family.causal,
        window=None if family.window is None else family.window(config, index),
        rotary=None if family.rotary is None else (kinds[index] if kinds else "all"),
    )


def _block(layer: nn.Module, heads: Heads, family: Family, config: Any) -> Block:
    linear = {role: _get(layer, family.path(role)) for role in family.roles}
    norms, update_norms = (
        [_norm(_get(layer, path), family) for path in paths or ()] for paths in (family.norms, family.update_norms)
    )
    scales = [_get(layer, path) for path in family.scales or ()]  # of a BEiT without: 1.0
    scale1, scale2 = scales if scales and torch.is_tensor(scales[0]) else (None, None)
    width = linear["o"].in_features // heads.query
    widths = heads.query * width, heads.key * width, heads.key * width
    qkv = [linear[role] for role in ("qkv", "q", "k", "v") if role in linear]
    mlp = [linear[role] for role in ("gate_up", "gate", "up", "fc1") if role in linear]
    return Block(
        qkv=stack_linears(qkv, ("q", "k", "v"), widths),
        o=stack_linears([linear["o"]], ("o",)),
        fc1=stack_linears(mlp, ("fc1",) if "fc1" in linear else ("gate", "up")),
        fc2=stack_linears([linear["fc2"]], ("fc2",)),
        norm1=norms[0],
        norm2=norms[1],
        heads=heads,
        activation=_activation(family, config),
        pre_norm=family.pre_norm,
        scale1=scale1,
        scale2=scale2,
        update_norms=(update_norms[0], update_norms[1]) if update_norms else (None, None),
        head_norms=_head_norms(layer, family, config, width),
        clamps_fp16=family.clamps_fp16,
    )


def _activation(family: Family, config: Any) -> str:
    return getattr(config, family.activation) if isinstance(family.activation, str) else family.activation(config)


def _head_norms(layer: nn.Module, family: Family, config: Any, width: int) -> tuple[RMSNorm, RMSNorm] | None:
    """Of queries and keys; another scale of the softmax than 1 / sqrt(Dh) is one of the queries."""
    if family.head_norms is None:
        return None
    q, k = (_norm(_get(layer, path), family) for path in family.head_norms)
    assert isinstance(q, RMSNorm) and isinstance(k, RMSNorm)
    if family.query_scale is not None:
        q.factor = family.query_scale(config, width)
    return q, k


def stack_linears(
    linears: list[nn.Linear], roles: tuple[str, ...], widths: tuple[int, ...] | None = None
) -> LoraLinear:
    """Linears of equal input as one `LoraLinear`; a missing bias (Whisper's keys) counts as zeros beside others.

    widths: rows of each role; None: as the linears have them, or all alike where one linear has all roles.
    """
    weights, scales = zip(*map(_stored, linears), strict=True)
    if len({scale is None for scale in scales}) > 1:
        raise ValueError(f"{'+'.join(roles)} are partly int8 and partly floating: quantise all of them or none")
    if widths is None and len(linears) == len(roles):
        widths = tuple(len(weight) for weight in weights)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    scale = None if scales[0] is None else torch.cat(scales)
    biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return LoraLinear(weight, None, roles, scale, widths)
    filled = [given[0].new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return LoraLinear(weight, torch.cat(filled), roles, scale, widths)


TAKEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8)  # others have scales of their own


def _stored(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A linear's weight `[N, K]`, and its scales `[N]` where bitsandbytes has made it int8 already."""
    held = linear.weight.dtype if torch.is_tensor(linear.weight) else None
    if held == torch.uint8:
        raise ValueError("encoders loaded in 4 bit are not taken: load in floating point and pass quantization='nf4'")
    if held not in TAKEN:
        raise ValueError(
            f"a {type(linear).__name__} of {held or 'packed weights'} is not taken: load the encoder in floating point "
            "and pass quantization='int8'"
        )
    weight = linear.weight.detach().as_subclass(torch.Tensor)
    if weight.dtype != torch.int8:
        return weight, None
    scb = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB  # it moves in the first forward
    return weight, scb.detach().float() / 127


def _plain(linear: nn.Linear) -> nn.Linear:
    """A linear that bitsandbytes has made int8 in floating point: outside the blocks nothing stays quantised."""
    weight, scale = _stored(linear)
    plain = nn.Linear(linear.in_features, linear.out_features, device="meta")
    plain.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach())
    whole = weight if scale is None else weight * scale[:, None]
    plain.weight = nn.Parameter(whole if plain.bias is None else whole.to(plain.bias.dtype))
    return plain


def _norm(norm: nn.Module, family: Family) -> BlockNorm | None:
    """A copy, since BitFit trains biases and the caller's model must not change; None of an identity (ModernBERT)."""
    if isinstance(norm, nn.Identity):
        return None
    if norm.weight is None:
        raise ValueError(f"a {type(norm).__name__} without weights is not supported: give it ones")
    if isinstance(norm, nn.LayerNorm):
        return copy.deepcopy(norm)
    name = type(norm).__name__
    if "RMS" not in name or getattr(norm, "bias", None) is not None:
        raise ValueError(f"a {name} is not read, since it may be LayerNorm or RMSNorm: put torch's own in its place")
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
    return RMSNorm(norm.weight, torch.finfo(norm.weight.dtype).eps if eps is None else eps, family.norm_offset)


def _share(module: nn.Module) -> nn.Module:
    """A frozen copy of the module that shares the caller's matrices, but not the vectors: biases may train."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters() if p.dim() > 1
    }
    linears = (part for part in module.modules() if isinstance(part, nn.Linear))
    memo |= {id(linear): _plain(linear) for linear in linears if linear.weight.dtype == torch.int8}
    return copy.deepcopy(module, memo).requires_grad_(False)


def _get(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
