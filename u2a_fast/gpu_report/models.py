"""ViT-B/16 and BERT-base with random weights, batches, and the same U2A step written with transformers and PEFT."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel

from ..encoders.build import family_of
from ..lora_config import LoraConfig
from ..methods import U2A
from .report import NoResult

Inputs = dict[str, Any]
Models = dict[str, PreTrainedModel]

CLASSES, RANK, ALPHA = 8, 8, 16
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "attention.output.dense"),
    *("attn.Wqkv", "attn.Wo"),  # ModernBERT's
)


def vit_and_bert(device: torch.device, dtype: torch.dtype, image_size: int = 224, **sizes: int) -> Models:
    """Weights as drawn; other sizes than the base models' by the names of their configurations."""
    torch.manual_seed(0)
    image = ViTModel(ViTConfig(image_size=image_size, **sizes), add_pooling_layer=False)
    text = BertModel(BertConfig(**NO_DROPOUT, **sizes), add_pooling_layer=False)
    return {name: model.eval().to(device, dtype) for name, model in (("image", image), ("text", text))}


def tiny(device: torch.device, dtype: torch.dtype) -> Models:
    return vit_and_bert(device, dtype, 32, **TINY)


def ours(models: Models, **options: Any) -> U2A:
    """U2A over copies of the encoders, training; the same seed draws the same adapters."""
    torch.manual_seed(1)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA)
    device = next(iter(models.values())).device
    return U2A(copy.deepcopy(models), CLASSES, lora=lora, modality_dropout=0.0, **options).to(device).train()


def presence_table(batch: int, missing: float) -> Tensor:
    """bool [B, 2] (image, text): a share of `missing` lacks one of the two, either equally often."""
    present, lacking = torch.ones(batch, 2, dtype=torch.bool), round(batch * missing)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    present[order[: lacking // 2], 0] = False
    present[order[lacking // 2 : lacking], 1] = False
    return present


def even_lengths(batch: int, shortest: int, longest: int) -> Tensor:
    lengths = torch.linspace(shortest, longest, batch).round().long()
    return lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def make_batch(lengths: Tensor, present: Tensor, device: torch.device, dtype: torch.dtype, side: int = 224) -> Inputs:
    """A batch as our collator makes it: pictures of zeros, and one token behind which all is padding, where absent."""
    generator, batch, longest = torch.Generator().manual_seed(0), len(lengths), int(lengths.max())
    has_image, has_text = present.unbind(1)
    mask = (torch.arange(longest) < lengths[:, None]) & has_text[:, None]
    mask[~has_text, 0] = True
    ids = torch.randint(1000, 20000, (batch, longest), generator=generator) * mask
    pixels = torch.randn(batch, 3, side, side, generator=generator) * has_image[:, None, None, None]
    made = {
        "image": {"pixel_values": pixels.to(dtype)},
        "text": {"input_ids": ids, "attention_mask": mask.long()},
        "modality_mask": present,
        "labels": torch.randint(0, CLASSES, (batch,), generator=generator),
    }
    return on_device(made, device)


def on_device(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Mapping):
        return {name: on_device(value, device) for name, value in tree.items()}
    return tree.to(device) if torch.is_tensor(tree) else tree


def clear(trained: Iterable[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = None


def loss_of(output: Any) -> Tensor:
    return output if torch.is_tensor(output) else output.loss


class PeftU2A(nn.Module):
    """U2A as one would write it with transformers and PEFT: every row runs, and absent ones are replaced after.

    Args:
        models: encoders by modality, image and text.
        attention: transformers' name of an implementation.
        autocast: compute in bf16 over the weights' own dtype.
    """

    def __init__(self, models: Models, attention: str = "sdpa", autocast: bool = False):
        super().__init__()
        device = next(iter(models.values())).device
        self.encoders = nn.ModuleDict({name: with_peft(model, attention) for name, model in models.items()})
        widths = {name: model.config.hidden_size for name, model in models.items()}
        self.mask_tokens = nn.ParameterDict({name: torch.randn(1, 1, d) * 0.02 for name, d in widths.items()})
        self.head, self.autocast = nn.Linear(widths["image"], CLASSES), autocast
        self.to(device)

    def read(self, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Class token and mask token's row of all samples, `[B, D]` each."""
        from transformers.masking_utils import create_bidirectional_mask

        model = self.encoders[name].base_model.model
        mask = inputs.get("attention_mask")
        values = {key: value for key, value in inputs.items() if key != "attention_mask"}
        if "pixel_values" in values:
            values["pixel_values"] = values["pixel_values"].to(model.dtype)
        tokens = model.embeddings(**values)
        rows = torch.cat([tokens, self.mask_tokens[name].to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
            mask = create_bidirectional_mask(config=model.config, inputs_embeds=rows, attention_mask=mask)
        for layer in model.get_submodule(family_of(model).layers):
            rows = layer(rows, mask)
        rows = model.layernorm(rows) if hasattr(model, "layernorm") else rows
        return rows[:, 0].float(), rows[:, -1].float()

    def forward(self, image: Inputs, text: Inputs, modality_mask: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.head.weight.device.type, torch.bfloat16, enabled=self.autocast):
            (c_image, to_text), (c_text, to_image) = self.read("image", image), self.read("text", text)
        has_image, has_text = modality_mask.unsqueeze(2).unbind(1)
        fused = torch.where(has_image, c_image, to_image) + torch.where(has_text, c_text, to_text)
        both = (has_image & has_text).float()
        pairs = both.sum().clamp(min=1) * c_image.shape[1]
        align = ((to_text - c_text.detach()).square() * both).sum() / pairs
        align = align + ((to_image - c_image.detach()).square() * both).sum() / pairs
        return F.cross_entropy(self.head(fused), labels) + 0.2 * align


def with_peft(model: PreTrainedModel, attention: str) -> nn.Module:
    """A copy with LoRA on q, k, v and o; NoResult where PEFT is missing."""
    if importlib.util.find_spec("peft") is None:
        raise NoResult("peft is not installed")
    import peft

    adapted = copy.deepcopy(model)
    adapted.set_attn_implementation(attention)
    names = [name for name, module in adapted.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in names if name.endswith(PROJECTIONS)]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    return peft.get_peft_model(adapted, config, autocast_adapter_dtype=False)
