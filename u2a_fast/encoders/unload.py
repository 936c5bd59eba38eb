"""The way back: an `Encoder` as the plain Hugging Face model that it was read from."""

from __future__ import annotations

import copy
import inspect
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import kernels
from ..adapters import linear_of, low_ranks
from ..block import Block
from ..lora import LoraLinear
from ..norms import RMSNorm
from .base import Encoder, Family, Origin

OF_QUANTIZATION = ("quantization_config", "_pre_quantization_dtype")  # what a config says of it


@torch.no_grad()
def unload(encoder: Encoder) -> PreTrainedModel:
    """A copy of an encoder as the Hugging Face model it was read from, `W + scaling B A` in place of each weight.

    In eval mode, nothing frozen, in the encoder's dtype; int8 and 4-bit weights in floating point. What the encoder
    does not use (a pooler) is as it was. Where weights are not those that were read, it has no `name_or_path` any more.

    Raises:
        ValueError: it was not read from a model, or its class does not build what the encoder holds.

    >>> from transformers import BertConfig, BertModel
    >>> from u2a_fast.encoders import from_pretrained_model
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> bert = BertModel(BertConfig(vocab_size=9, **sizes)).eval()
    >>> ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    >>> torch.equal(unload(from_pretrained_model(bert))(**ids).last_hidden_state, bert(**ids).last_hidden_state)
    True
    """
    family, origin = encoder.family, encoder.origin
    if origin is None:
        raise ValueError("an encoder that was put together by hand has no Hugging Face model to go back to")
    model = _without_values(encoder, origin)
    for name, module in encoder.stem.items():
        if isinstance(module, RMSNorm):
            _assign(model, f"{family.stem[name]}.weight", module.weight)
        elif module is not None:  # as the final norm of Data2Vec, which is an identity
            model.set_submodule(family.stem[name], copy.deepcopy(module))
    for rotary in list(encoder.rotary.values())[:1]:  # one module says the angles of all types of layers
        model.set_submodule(family.rotary, copy.deepcopy(rotary.angles))
    for layer, block in zip(model.get_submodule(family.layers), encoder.blocks, strict=True):
        _write_linears(layer, block, family, encoder.dtype)
        _write_vectors(layer, block, family)
    for name, tensor in origin.kept.items():
        _assign(model, name, tensor.to(encoder.blocks[0].o.weight.device))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(encoder.dtype)
    empty = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if empty:
        raise ValueError(f"{type(model).__name__} has {empty[0]}, which its encoder does not hold")
    return model.eval().requires_grad_(True)


def _write_linears(layer: nn.Module, block: Block, family: Family, dtype: torch.dtype) -> None:
    """A layer's linears, each of which plays one or several roles of the block.

    Raises:
        ValueError: a bias has trained that the layer does not have, and that its hidden states depend on.
    """
    for path, roles in family.linears.items():
        linear = linear_of(block, roles[0])
        _assign(layer, f"{path}.weight", torch.cat([merged_weight(linear, role, dtype) for role in roles]))
        if linear.bias is None:
            continue
        bias = torch.cat([linear.bias[linear.rows_of(role)] for role in roles])
        if layer.get_submodule(path).bias is not None:
            _assign(layer, f"{path}.bias", bias)
        elif bias.any() and not (roles == ("k",) and _ignores_shifts(block)):
            raise ValueError(f"{type(layer).__name__} has no bias at {path}, where this encoder has trained one")


def _ignores_shifts(block: Block) -> bool:
    """Whether the same shift of all keys changes nothing: every score of a query moves by as much then."""
    return block.heads.rotary is None and block.k_norm is None


def _write_vectors(layer: nn.Module, block: Block, family: Family) -> None:
    """A layer's norms and scales, those that it has."""
    for name, path in family.vectors.items():
        part = getattr(block, name)
        if isinstance(part, nn.Module):
            for leaf, parameter in part.named_parameters():
                _assign(layer, f"{path}.{leaf}", parameter)
        elif part is not None:
            _assign(layer, path, part)


def _without_values(encoder: Encoder, origin: Origin) -> PreTrainedModel:
    """A model of the encoder's class, on the meta device."""
    config = copy.deepcopy(encoder.config)
    for name in OF_QUANTIZATION:
        config.__dict__.pop(name, None)
    if not getattr(config, "key_bias", True):  # of DINOv3, whose positions turn keys and their bias, if it has trained
        config.key_bias = any(_bias_of_keys(block.qkv) for block in encoder.blocks)
    build, options = origin.model_class, {}
    if "add_pooling_layer" in inspect.signature(build.__init__).parameters:
        options["add_pooling_layer"] = any(name.startswith("pooler.") for name in origin.kept)
    with torch.device("meta"):
        model = build(config, **options)
    # Or a model that is built on it, saved and loaded would read what is under that name again.
    model.name_or_path = encoder.name_or_path if _is_as_read(encoder) else ""
    return model


def _is_as_read(encoder: Encoder) -> bool:
    """Whether nothing was trained or rounded: its weights are those that lie where it came from."""
    changed = encoder.was_trained or any(p.requires_grad or "lora_" in name for name, p in encoder.named_parameters())
    return not changed and all(linear.storage == "float" for block in encoder.blocks for linear in block.linears)


def _bias_of_keys(qkv: LoraLinear) -> bool:
    return qkv.bias is not None and bool(qkv.bias[qkv.rows_of("k")].any())


def _assign(module: nn.Module, path: str, value: Tensor) -> None:
    """Put a copy of `value` where a parameter or buffer of that name is."""
    owner, _, name = path.rpartition(".")
    module = module.get_submodule(owner)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value.detach().clone())
    else:
        module._buffers[name] = value.detach().clone()


def merged_weight(linear: LoraLinear, role: str, dtype: torch.dtype) -> Tensor:
    """`W + scaling B A` of one role, `[N, K]`, added in fp32 (fp64 where the encoder is) and rounded to `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    if linear.storage == "nf4":
        shape = (linear.out_features, linear.in_features)
        weight = kernels.unpack_nf4(linear.weight, linear.weight_scale, shape, exact)
    elif linear.storage == "int8":
        weight = kernels.dequantize_rows(linear.weight, linear.weight_scale, exact)
    else:
        weight = linear.weight.to(exact)
    weight = weight[linear.rows_of(role)]
    if linear.has_adapter and role in linear.adapted:
        part = low_ranks(linear)[role]
        weight = torch.addmm(weight, part.b.to(exact), part.a.to(exact), alpha=part.scaling)
    return weight.to(dtype)
