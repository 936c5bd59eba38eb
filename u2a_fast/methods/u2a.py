"""U2A: LoRA and one mask token per missing modality (arXiv 2501.17823)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import host, kernels
from ..encoders.frozen import add_adapters
from ..layout import of_plan, plan_of
from ..lora_config import LoraConfig, read_lora
from ..padding import Padding, padding_of
from .base import MultimodalModel, PaddingMasks
from .config import MultimodalConfig, Option, check_choice
from .presence import Rows, all_take_part, nobody, of_samples

PARTS = 8  # of a batch: how finely the samples of a captured step are counted
Read = tuple[Tensor, Tensor]  # what one encoder says: class tokens [B, D], proxies [M - 1, B, D]


class U2AConfig(MultimodalConfig):
    model_type = "u2a"


@dataclass
class U2AEncoded:
    """class_tokens `[M, B, D]`; proxies `[M, M, B, D]`: row (m, j) is what encoder m says in place of modality j."""

    class_tokens: Tensor
    proxies: Tensor


class U2A(MultimodalModel):
    """Unified Unimodal Adaptation: frozen encoders, adapted jointly, whose mask tokens stand in for what is missing.

    ::

        h_m = E_m([CLS_m ; X_m ; MT_m])
        c_m = T_m(class token of h_m)      p_{m->j} = T_m(row of h_m of its mask token for j)
        z = sum_j (c_j where j is present, else the mean of p_{m->j} over the present m)      logits = W z + b
        loss = task + align_weight * sum_{m != j} MSE(p_{m->j}, stop_gradient(c_j)) over samples that have both

    T_m is the identity, as in the paper, but a translator, Linear(D_m -> D), where D_m is not D, the largest width
    (ours). With `translate_all` every T_m is one, from the identity where D_m = D.

    With `separate_heads` (ours) every T_m ends in a LayerNorm without parameters, and `logits = sum_j W_j z_j + b`,
    where z_j are the terms of z: class tokens of unlike size, DINOv2's and MiniLM's by four times, no longer share one
    head, in which the larger drowns the smaller.

    Args:
        encoders: `{modality: Hugging Face encoder, hub id, folder or Encoder}`; their order is the modality order.
        num_labels: C.
        problem_type: as in Hugging Face's classifiers; None: told from the labels.
        lora: a `LoraConfig` (or PEFT's), None to train mask tokens and head only. The default rank is ours.
        quantization: how frozen linears are stored, see `u2a_fast.quantization`; None: as they came.
        modality_dropout: probability that a training sample loses one of its modalities (never the last; ours).
        align_weight: the paper's lambda, 0.2.
        all_absent: `"error"`, or `"prior"`: a sample with nothing is classified from the mean of the mask tokens.
        absent: `"pack"`: absent rows are not computed; `"where"`: static shapes, for compile and export.
        processors: `{modality: processor}` for raw samples; by default loaded from the encoders' folders.
        translate_all: ours, see above; off is the paper's form.
        label_smoothing: of the cross entropy, while training. Not Trainer's `label_smoothing_factor`, which takes the
            labels away from the model and the alignment loss with them.
        separate_heads: ours, see above; off is the paper's form. `u2a-fast train` sets it (docs/choosing.md).

    Source: methods as in the paper's section 3; stop-gradient, translators and more than two modalities are ours.

    >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> text = BertModel(BertConfig(vocab_size=9, **sizes))
    >>> image = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = U2A({"image": image, "text": text}, num_labels=3).eval()
    >>> present = torch.tensor([[True, True], [False, True]])
    >>> out = model(image={"pixel_values": torch.randn(2, 3, 8, 8)}, text={"input_ids": torch.ones(2, 4).long()},
    ...             modality_mask=present, labels=torch.tensor([0, 2]))
    >>> out.logits.shape
    torch.Size([2, 3])
    """

    config_class = U2AConfig
    modality_dropout = Option(lambda value: 0 <= value <= 1, "in [0, 1]")
    align_weight = Option(lambda value: value >= 0, "at least 0")
    absent = Option(("pack", "where").__contains__, 'one of ["pack", "where"]')

    def __init__(
        self,
        encoders: Mapping[str, str | nn.Module],
        num_labels: int,
        problem_type: str | None = None,
        lora: LoraConfig | None = LoraConfig(),  # noqa: B008 - frozen
        quantization: Any = None,
        modality_dropout: float = 0.3,
        align_weight: float = 0.2,
        all_absent: str = "error",
        absent: str = "pack",
        processors: Mapping[str, Any] | None = None,
        translate_all: bool = False,
        label_smoothing: float = 0.0,
        separate_heads: bool = False,
    ):
        lora = read_lora(lora)
        check_choice("translate_all", translate_all, (True, False))
        check_choice("separate_heads", separate_heads, (True, False))
        super().__init__(
            encoders,
            num_labels,
            problem_type,
            quantization,
            processors,
            all_absent=all_absent,
            label_smoothing=label_smoothing,
            lora=lora and lora.to_dict(),
            modality_dropout=modality_dropout,
            align_weight=align_weight,
            absent=absent,
            translate_all=translate_all,
            separate_heads=separate_heads,
        )
        self.separate_heads = separate_heads
        add_adapters(self.encoders.values(), lora)
        widths = {name: encoder.width for name, encoder in self.encoders.items()}
        width, others = max(widths.values()), len(widths) - 1
        self.mask_tokens = nn.ParameterDict({m: nn.Parameter(torch.randn(others, d) * 0.02) for m, d in widths.items()})
        self.translators = nn.ModuleDict(
            {m: translator(d, width) for m, d in widths.items() if translate_all or d != width}
        )
        self.width = width
        self.head = nn.Linear(width * len(widths) if separate_heads else width, num_labels)
        self.post_init()

    @classmethod
    def recipe(cls, options: Any) -> dict[str, Any]:
        return {
            "lora": options.lora,
            "modality_dropout": options.modality_dropout,
            "translate_all": options.translators,
            "separate_heads": options.separate_heads,
        }

    @property
    def auxiliary_weight(self) -> float:
        return self.align_weight

    @property
    def reentrant(self) -> bool:
        """Mask tokens enter the first block by position."""
        return all(tokens.requires_grad for tokens in self.mask_tokens.values())

    @property
    def static_shapes(self) -> bool:
        return self.absent == "where"

    def encode(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None = None
    ) -> U2AEncoded:
        encoded = self._static(inputs, present) if self.static_shapes else self._packed(inputs, present, padding)
        return self._joined(encoded, present)

    def _joined(self, encoded: Mapping[str, Read], present: Tensor) -> U2AEncoded:
        nothing = self.head.weight.new_zeros(present.shape[0], self.width)  # `len` is a constant in an export
        class_tokens, proxies = [], []
        for i, name in enumerate(self.config.modalities):
            tokens, stand_ins = encoded.get(name, (nothing, nothing.expand(present.shape[1] - 1, -1, -1)))
            class_tokens.append(tokens)
            proxies.append(torch.cat([stand_ins[:i], tokens.detach()[None], stand_ins[i:]]))  # diagonal unused
        return U2AEncoded(torch.stack(class_tokens), torch.stack(proxies))

    def fixed(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None
    ) -> dict[str, Any]:
        """All samples; or with `absent="pack"` the rows of those that are present, filled up to a common size."""
        if self.static_shapes:
            return {"inputs": dict(inputs), "present": present}
        present, fixed = self._left(present), {}
        for i, name in enumerate(self.config.modalities):
            if name in inputs and present[:, i].any():
                fixed[name] = self._fixed(name, inputs[name], present[:, i], (padding or {}).get(name))
        return {"packed": fixed, "present": present}

    def _fixed(self, name: str, inputs: Mapping[str, Any], here: Tensor, mask: Tensor | None) -> dict[str, Any]:
        encoder, batch = self.encoders[name], len(here)
        inputs = encoder.lengthened(inputs)
        if mask is not None and encoder.packs_by_plan:
            length = inputs["input_ids"].shape[1]
            plan, sizes = plan_of(mask, here, length, self.mask_tokens[name].shape[0], 2 * PARTS)
            return {"inputs": inputs, "plan": plan, "sizes": sizes}
        positions = here.nonzero().flatten()
        spare = -len(positions) % max(1, batch // PARTS)
        device = next(value.device for value in inputs.values() if torch.is_tensor(value))
        chosen = host.send(torch.cat([positions, positions[-1:].expand(spare)]), device)
        nowhere = torch.full((spare,), batch, device="cpu")  # a row that nobody reads
        return {"inputs": of_samples(inputs, chosen, batch), "index": torch.cat([positions, nowhere])}

    def encode_fixed(self, fixed: Mapping[str, Any]) -> tuple[U2AEncoded, Tensor]:
        present = fixed["present"]
        if self.static_shapes:
            present = self._left(present)
            return self._joined(self._static(fixed["inputs"], present), present), present
        encoded, batch = {}, len(present)
        for name, packed in fixed["packed"].items():
            encoder, suffix = self.encoders[name], self.mask_tokens[name]
            if "plan" in packed:
                here = present[:, self.config.modalities.index(name)]
                tokens, _ = encoder.embed(**_clean(packed["inputs"], here))
                layout = of_plan(packed["plan"], packed["sizes"]).turned(encoder.angles(tokens, len(suffix)))
                read = encoder.read_laid_out(tokens, layout, suffix)
                encoded[name] = self._projected(name, *read)
            else:
                tokens, mask = encoder.embed(**packed["inputs"])
                class_token, proxies = self.read(name, tokens, padding_of(mask, static=True))
                rows = Rows(None, packed["index"], packed["inputs"])
                class_token, proxies = rows.spread(class_token, batch + 1), rows.spread(proxies, batch + 1, dim=1)
                encoded[name] = class_token[:batch], proxies[:, :batch]
        return self._joined(encoded, present), present

    def fuse(self, encoded: U2AEncoded, present: Tensor) -> tuple[Tensor, Tensor]:
        present = host.send(present, encoded.class_tokens.device)
        fused, align_loss = kernels.substitute(encoded.class_tokens, encoded.proxies, present)  # [B, D]
        logits = self._by_each(encoded, present) if self.separate_heads else self.head(fused)
        if self.all_absent == "prior":
            logits = torch.where(present.any(dim=1, keepdim=True), logits, self._prior().to(logits.dtype))
        return logits, align_loss

    def _by_each(self, encoded: U2AEncoded, present: Tensor) -> Tensor:
        """sum_j W_j z_j + b, `[B, C]`: what encoders say is multiplied before it is chosen, by the weights of j."""
        has = present.t()[:, :, None]  # [M, B, 1]; rows of others may hold anything
        weights = self.head.weight.unflatten(1, (-1, self.width)).permute(1, 2, 0)  # [M, D, C]
        own = torch.where(has, encoded.class_tokens, 0) @ weights  # [M, B, C]
        stand_ins = torch.where(has[:, None], encoded.proxies, 0) @ weights  # [M, M, B, C]
        return kernels.substitute(own, stand_ins, present)[0] + self.head.bias

    def drop_modalities(self, present: Tensor) -> Tensor:
        """With probability `modality_dropout` a sample loses one present modality, drawn uniformly, never its last."""
        if self.modality_dropout == 0:
            return present
        draw = torch.rand(present.shape, device=present.device).masked_fill(~present, -1)
        lost = torch.zeros_like(present).scatter(1, draw.argmax(dim=1, keepdim=True), True)
        chosen = torch.rand(present.shape[0], 1, device=present.device) < self.modality_dropout
        return present & ~(lost & chosen & (present.sum(dim=1, keepdim=True) > 1))

    def _packed(self, inputs: Mapping[str, Any], present: Tensor, padding: PaddingMasks | None) -> dict[str, Read]:
        """Only the rows that are present run; the others stay 0."""
        rows = self.rows(inputs, present, padding)
        return {name: self._spread(name, own, len(present)) for name, own in rows.items()}

    def _static(self, inputs: Mapping[str, Any], present: Tensor) -> dict[str, Read]:
        """All rows run; absent ones start from zeros, since a NaN there would reach the gradients."""
        encoded = {}
        for name, here in zip(self.encoders, host.send(present, self.head.weight.device).unbind(1), strict=True):
            if name in inputs:
                tokens, mask = self.encoders[name].embed(**_clean(inputs[name], here))
                encoded[name] = self.read(name, tokens, padding_of(mask, static=True), here)
            elif all_take_part():
                encoded[name] = self._spread(name, nobody(self.device), len(present))
        return encoded

    def _spread(self, name: str, rows: Rows, batch: int) -> Read:
        class_token, proxies = self.read(name, *rows.embed(self.encoders[name]))
        return rows.spread(class_token, batch), rows.spread(proxies, batch, dim=1)

    def read(self, name: str, tokens: Tensor, padding: Padding | None, here: Tensor | None = None) -> Read:
        """tokens `[B, S, D_m]` -> class tokens `[B, D]` and proxies `[M - 1, B, D]`.

        here: bool `[B]`, who has the modality where not all of the samples do; the tokens of others are never read.
        """
        return self._projected(name, *self.encoders[name].read(tokens, padding, self.mask_tokens[name], here))

    def _projected(self, name: str, class_token: Tensor, learned: Tensor) -> Read:
        return self._project(name, class_token), self._project(name, learned.transpose(0, 1))

    def _project(self, name: str, rows: Tensor) -> Tensor:
        """Rows of encoder `name` as they are compared and summed: behind its translator, in the head's dtype."""
        rows = rows.to(self.head.weight.dtype).contiguous()  # a view would keep the whole hidden state for backward
        rows = self.translators[name](rows) if name in self.translators else rows
        return F.layer_norm(rows, rows.shape[-1:]) if self.separate_heads else rows

    def _prior(self) -> Tensor:
        """Logits `[C]` of a sample with nothing: each z_j, or z, is the mean of all mask tokens in the common width."""
        z = torch.cat([self._project(name, tokens) for name, tokens in self.mask_tokens.items()]).mean(dim=0)
        return self.head(z.repeat(self.head.in_features // self.width))


def translator(own: int, common: int) -> nn.Linear:
    """Linear(own -> common), the identity where they are equal."""
    linear = nn.Linear(own, common)
    if own == common:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def _clean(inputs: Mapping[str, Any], here: Tensor) -> dict[str, Any]:
    """Inputs with zeros in the rows of samples that are not `here`, bool `[B]`, whatever these held."""
    return {
        name: torch.where(here.view(-1, *[1] * (value.dim() - 1)), value, 0) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }
