"""A frozen Hugging Face encoder, run layer by layer through Hugging Face's own modules, with learned rows beside x."""

import copy
import math
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .embeddings import Embedded
from .families import family_of, places_of, visible_rows
from .layers import Rotation, exact_norm, prepare


class LoraLinear(nn.Module):
    """W x + b + scaling * B A x (Hu et al., arXiv 2106.09685, section 4.1); A [r, in], B [out, r], B starts at 0."""

    def __init__(self, base: nn.Linear, r: int, scaling: float):
        super().__init__()
        self.base, self.scaling = base, scaling
        like_base = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.lora_a = nn.Parameter(torch.empty(r, base.in_features, **like_base))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, r, **like_base))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        low_rank = linear(linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return self.base(x) + (self.scaling * low_rank).to(x.dtype)


class ReferenceEncoder(nn.Module):
    """embed -> layers -> finish of a Hugging Face encoder (a copy: the caller's model stays as it is).

    Frozen, and in eval mode whatever `train()` is called. SDPA is asked for because it takes a boolean mask as it is
    and stays in float64, where several eager implementations compute their softmax in float32.
    """

    def __init__(self, hf_model: nn.Module):
        super().__init__()
        self.family, self.model = family_of(hf_model), copy.deepcopy(hf_model)
        prepare(self.layers, self.model.config.num_attention_heads, self.family.norm_offset)
        if self.final_norm is not None:
            self.model.set_submodule(self.family.final_norm, exact_norm(self.final_norm, self.family.norm_offset))
        self.model.requires_grad_(False).eval()
        self.model.set_attn_implementation("sdpa")
        self.width = self.model.config.hidden_size
        self.num_layers = len(self.layers)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.layers)

    @property
    def final_norm(self) -> nn.Module | None:
        return None if self.family.final_norm is None else attrgetter(self.family.final_norm)(self.model)

    def part(self, layer: int, name: str) -> nn.Module:
        """`name`: q, k, v, o, fc1 (or gate, up), fc2, norm1 (beside attention) or norm2 (beside the MLP)."""
        return self.layers[layer].get_submodule(self.family.parts[name])

    def train(self, mode: bool = True) -> "ReferenceEncoder":
        return super().train(False)

    def embed(self, **inputs: Tensor) -> Embedded:
        """Hugging Face's inputs -> tokens [B, S, D], padding_mask [B, S] (True = a real row) or None."""
        dtype = self.model.dtype
        return self.family.embed(
            self.model, **{k: v.to(dtype) if torch.is_floating_point(v) else v for k, v in inputs.items()}
        )

    def run_layer(
        self,
        index: int,
        tokens: Tensor,
        padding_mask: Tensor | None = None,
        learned: Tensor | None = None,
        read_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Layer `index` on [tokens ; learned]: tokens [B, S, D], learned [n, D] or [B, n, D] -> the same two, [B, ...].

        Learned rows carry no position embedding; where positions turn rows, they have the next places (`places_of`).
        Who sees whom: `visible_rows`.
        """
        batch, length, width = tokens.shape
        if learned is None:
            learned = tokens.new_zeros(0, width)
        learned = learned.to(tokens.dtype).expand(batch, -1, -1)
        real = self.real_rows(tokens, padding_mask)
        window = self.family.window(self.model.config, index)
        visible = visible_rows(real, learned.shape[1], read_only, self.family.causal, window)
        rotation = self.rotation(index, tokens, places_of(real, learned.shape[1]))
        rows = self.family.run(self.layers[index], torch.cat([tokens, learned], dim=1), visible, rotation)
        return rows[:, :length], rows[:, length:]

    def rotation(self, index: int, tokens: Tensor, places: Tensor) -> Rotation | None:
        """cos and sin [B, L, Dh] of rows at `places` [B, L] in layer `index`; None: positions turn nothing."""
        if self.family.rotary is None:
            return None
        config, angles = self.model.config, self.model.get_submodule(self.family.rotary)
        kinds = getattr(config, "layer_types", None)
        return self.family.angles(angles, config, kinds[index] if kinds else None, tokens, places)

    @staticmethod
    def real_rows(tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        """bool [B, S]"""
        if padding_mask is not None:
            return padding_mask
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def finish(self, rows: Tensor) -> Tensor:
        """The norm after the last layer, where the family has one: [B, n, D] -> [B, n, D]."""
        return rows if self.final_norm is None else self.final_norm(rows)

    def class_token(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Finished tokens [B, S, D], without learned rows -> [B, D]: see `Family.class_token`."""
        classes = []
        for sample, real in zip(tokens, self.real_rows(tokens, padding_mask), strict=True):
            rows = sample[real]
            classes.append({"first": rows[0], "last": rows[-1], "mean": rows.mean(dim=0)}[self.family.class_token])
        return torch.stack(classes)

    def read(self, inputs: dict[str, Tensor], learned: Tensor, read_only: bool = False) -> tuple[Tensor, Tensor]:
        """`learned` [n, D] joins at the input and goes through all layers -> class token [B, D], its rows [B, n, D]."""
        tokens, padding_mask = self.embed(**inputs)
        for index in range(self.num_layers):
            tokens, learned = self.run_layer(index, tokens, padding_mask, learned, read_only)
        return self.class_token(self.finish(tokens), padding_mask), self.finish(learned)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Hugging Face's last_hidden_state [B, S, D]; rows of padding are undefined."""
        tokens, padding_mask = self.embed(**inputs)
        for index in range(self.num_layers):
            tokens, _ = self.run_layer(index, tokens, padding_mask)
        return self.finish(tokens)

    def add_lora(self, r: int, lora_alpha: float, target_modules: tuple[str, ...], use_rslora: bool = False) -> None:
        """A LoRA path on the linears of these roles in every layer; scaling alpha / r, or alpha / sqrt(r) (rsLoRA).

        fc1 means gate and up where the MLP has them; of an encoder without a role, nothing is asked.
        """
        scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        targets = (*target_modules, *(("gate", "up") if "fc1" in target_modules else ()))
        for layer in self.layers:
            for role in [role for role in self.family.parts if role in targets]:
                parent, _, name = self.family.parts[role].rpartition(".")
                owner = layer.get_submodule(parent)
                setattr(owner, name, LoraLinear(getattr(owner, name), r, scaling))

    def lora_factors(self) -> dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter]]:
        """(layer, role) -> A [r, in], B [out, r]."""
        parts = {(i, role): self.part(i, role) for i in range(self.num_layers) for role in self.family.parts}
        return {key: (part.lora_a, part.lora_b) for key, part in parts.items() if isinstance(part, LoraLinear)}

    def train_biases(self) -> None:
        """BitFit (Ben Zaken et al., arXiv 2106.10199): every bias inside the layers trains, LayerNorm's included.

        Ours: where one of q, k and v has a bias, the others have one as well, of zeros.
        """
        for index in range(self.num_layers):
            heads = [self.part(index, name) for name in "qkv"]
            given = [part.bias for part in heads if part.bias is not None]
            for part in heads if given else ():
                if part.bias is None:
                    part.bias = nn.Parameter(given[0].new_zeros(part.out_features))
        for name, parameter in self.layers.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
