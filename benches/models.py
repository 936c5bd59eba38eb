"""Encoders, batches and the same training step written with transformers + PEFT: what the step benches compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from arms import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel
from transformers.masking_utils import create_bidirectional_mask

from u2a_fast import MissingPattern
from u2a_fast.encoders.build import family_of
from u2a_fast.memory import saved_bytes

Inputs = dict[str, Any]
Models = dict[str, PreTrainedModel]

TARGETS = {
    "image": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "text": ["query", "key", "value", "attention.output.dense"],
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
CLASSES, RANK, ALPHA = 8, 8, 16


def vit_and_bert(layers: int, dtype: torch.dtype = torch.float32, image_size: int = 224, **sizes: int) -> Models:
    """ViT-B/16 and BERT-base with weights as drawn, cut to `layers`; other widths through `sizes`."""
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=layers, image_size=image_size, **sizes)
    image = ViTModel(config, add_pooling_layer=False)
    text = BertModel(BertConfig(num_hidden_layers=layers, **NO_DROPOUT, **sizes), add_pooling_layer=False)
    return {name: model.eval().to(DEVICE, dtype) for name, model in (("image", image), ("text", text))}


def tiny_encoders(layers: int = 2, dtype: torch.dtype = torch.float32) -> Models:
    return vit_and_bert(layers, dtype, image_size=32, **TINY)


def presence_table(batch: int, missing_rate: float) -> Tensor:
    return MissingPattern(rate=missing_rate, kind="both").table(batch, ("image", "text"))


def texts(lengths: Tensor) -> Inputs:
    """Random tokens of these lengths, padded to the longest on the right."""
    generator = torch.Generator().manual_seed(0)
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(1000, 20000, (len(lengths), longest), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def even_lengths(batch: int, shortest: int, longest: int) -> Tensor:
    """Text lengths spread evenly and shuffled."""
    lengths = torch.linspace(shortest, longest, batch).round().long()
    return lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def make_batch(lengths: Tensor, present: Tensor, image_size: int = 224) -> Inputs:
    """A batch as our collator makes it: pictures of zeros, and one token behind which all is padding, where absent."""
    generator, batch = torch.Generator().manual_seed(0), len(lengths)
    has_image, has_text = present.unbind(1)
    text = texts(lengths)
    text["input_ids"][~has_text] = 0
    text["attention_mask"][~has_text] = 0
    text["input_ids"][~has_text, 0], text["attention_mask"][~has_text, 0] = 101, 1
    pictures = torch.randn(batch, 3, image_size, image_size, generator=generator) * has_image[:, None, None, None]
    made = {
        "image": {"pixel_values": pictures},
        "text": text,
        "modality_mask": present,
        "labels": torch.randint(0, CLASSES, (batch,), generator=generator),
    }
    return on_device(made)


def on_device(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: on_device(value) for name, value in tree.items()}
    return tree.to(DEVICE)


def real_rows(batch: Inputs) -> int:
    """Rows that an encoder has to run, one mask token in each sample included."""
    has_image, has_text = batch["modality_mask"].unbind(1)
    side = batch["image"]["pixel_values"].shape[2]
    patches = (side // 16) ** 2 + 1
    tokens = batch["text"]["attention_mask"][has_text].sum()
    return int(has_image.sum() * (patches + 1) + tokens + has_text.sum())


def with_peft(model: PreTrainedModel, name: str, attention: str | None = None) -> nn.Module:
    adapted = copy.deepcopy(model)
    if attention is not None:
        adapted.set_attn_implementation(attention)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[name])
    return peft.get_peft_model(adapted, config, autocast_adapter_dtype=False).to(DEVICE)


class PeftU2A(nn.Module):
    """U2A as one would write it with transformers and PEFT: every row runs, and absent ones are replaced after."""

    def __init__(self, models: Models, attention: str, autocast: bool = False):
        super().__init__()
        self.encoders = nn.ModuleDict({name: with_peft(model, name, attention) for name, model in models.items()})
        widths = {name: model.config.hidden_size for name, model in models.items()}
        self.mask_tokens = nn.ParameterDict({name: torch.randn(1, 1, d) * 0.02 for name, d in widths.items()})
        self.head, self.autocast = nn.Linear(widths["image"], CLASSES), autocast
        self.to(DEVICE)

    def read(self, name: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Class token and mask token's row of all samples, `[B, D]` each."""
        model = self.encoders[name].base_model.model
        mask = inputs.get("attention_mask")
        values = {key: value for key, value in inputs.items() if key != "attention_mask"}
        if "pixel_values" in values:
            values["pixel_values"] = values["pixel_values"].to(model.dtype)
        tokens = model.embeddings(**values)
        batch = tokens.shape[0]
        rows = torch.cat([tokens, self.mask_tokens[name].to(tokens.dtype).expand(batch, -1, -1)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            mask = create_bidirectional_mask(config=model.config, inputs_embeds=rows, attention_mask=mask)
        for layer in model.get_submodule(family_of(model).layers):
            rows = layer(rows, mask)
        rows = model.layernorm(rows) if hasattr(model, "layernorm") else rows
        return rows[:, 0].float(), rows[:, -1].float()

    def forward(self, image: Inputs, text: Inputs, modality_mask: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.autocast):
            (image, to_text), (text, to_image) = self.read("image", image), self.read("text", text)
        has_image, has_text = modality_mask.unsqueeze(2).unbind(1)
        fused = torch.where(has_image, image, to_image) + torch.where(has_text, text, to_text)
        both = (has_image & has_text).float()
        pairs = both.sum().clamp(min=1) * image.shape[1]
        align = ((to_text - text.detach()).square() * both).sum() / pairs
        align = align + ((to_image - image.detach()).square() * both).sum() / pairs
        return F.cross_entropy(self.head(fused), labels) + 0.2 * align


def step(model: nn.Module, *inputs: Any, **batch: Any) -> Callable[[], None]:
    """A training step but for the optimizer's."""
    return lambda: loss_of(model(*inputs, **batch)).backward()


def loss_of(output: Any) -> Tensor:
    return output if torch.is_tensor(output) else output.loss


def kept_by(model: nn.Module, *inputs: Any, **batch: Any) -> int:
    """Bytes that a step keeps for backward, parameters not counted."""
    return saved_bytes(lambda: loss_of(model(*inputs, **batch)), model.parameters())
