"""The transformer block of every supported encoder: the only place where kernels meet weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from . import kernels
from .lora import LoraLinear


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x)"""
    return F.silu(1.702 * x) / 1.702


def normalise(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` in the dtype of x; of all that it needs for backward, x alone is kept."""
    return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)


# Hugging Face's spellings that keep several tensors for backward, as the same function of one kept tensor.
LEAN_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), partial(F.gelu, approximate="tanh")
    ),
    "gelu_python": F.gelu,
}


FP16_LIMIT = torch.finfo(torch.float16).max - 1000  # Hugging Face's margin


class Block(GradientCheckpointingLayer):
    """Self-attention and MLP, each with a residual.

    ::

        pre-norm:   x = x + scale1 * o(attend(qkv(norm1(x))))     x = x + scale2 * fc2(act(fc1(norm2(x))))
        post-norm:  x = norm1(x + o(attend(qkv(x))))              x = norm2(x + fc2(act(fc1(x))))

    Its parts are public because PMF composes them differently: `project` (norm and q, k, v), `heads`,
    `kernels.attention`, `complete` (everything after attention).
    """

    def __init__(
        self,
        qkv: LoraLinear,
        o: LoraLinear,
        fc1: LoraLinear,
        fc2: LoraLinear,
        norm1: nn.LayerNorm,
        norm2: nn.LayerNorm,
        num_heads: int,
        activation: str,
        pre_norm: bool,
        scale1: torch.Tensor | None = None,
        scale2: torch.Tensor | None = None,
        causal: bool = False,
        clamps_fp16: bool = False,
    ):
        super().__init__()
        self.qkv, self.o, self.fc1, self.fc2 = qkv, o, fc1, fc2
        self.norm1, self.norm2 = norm1, norm2
        self.scale1 = None if scale1 is None else nn.Parameter(scale1.detach(), requires_grad=False)
        self.scale2 = None if scale2 is None else nn.Parameter(scale2.detach(), requires_grad=False)
        self.num_heads, self.pre_norm, self.causal, self.clamps_fp16 = num_heads, pre_norm, causal, clamps_fp16
        self.activation = activation
        self.act = LEAN_ACTIVATIONS.get(activation) or ACT2FN[activation]
        if isinstance(self.act, nn.Module) and [*self.act.parameters()]:
            raise ValueError(f"the activation {activation!r} has parameters of its own, which our block would not load")

    @property
    def linears(self) -> tuple[LoraLinear, LoraLinear, LoraLinear, LoraLinear]:
        return self.qkv, self.o, self.fc1, self.fc2

    def forward(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        suffix: torch.Tensor | None = None,
        suffix_rows: int = 0,
        present: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
        readers: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """tokens `[B, S, D]` -> `[B, S + Q, D]`; with `readers`, their rows `[B, K, D]` besides.

        Args:
            lengths: `[B]`, keys that are real among the token rows; None: all.
            suffix: `[Q, D]`, learned rows to append in this block.
            suffix_rows: how many of the rows in `tokens` are learned rows appended by a block before.
            present: bool `[B]`; the token rows of absent samples are never read, `mask_token` `[D]` stands in.
            readers: `[B, K, D]`, or `[1, K, D]` where all samples have the same: read-only rows, which see every row
                above and are seen by none, themselves included. Computed apart, so that the other rows are bitwise
                what they are without.
        """
        residual, qkv = self.project(tokens, suffix, present, mask_token)
        if suffix is not None:
            suffix_rows = suffix_rows + suffix.shape[0]
        q, k, v = self.heads(qkv)
        lora_a = self.o.lora_before_dropout
        attended, s = kernels.attention_project(q, k, v, lora_a, lengths, suffix=suffix_rows, causal=self.causal)
        tokens = self.complete(residual, attended, s)
        if readers is None:
            return tokens
        residual, qkv = self.project(readers)
        q = self.heads(qkv)[0].expand(k.shape[0], -1, -1, -1)
        return tokens, self.complete(residual, kernels.attention(q, k, v, lengths, suffix=suffix_rows))

    def project(
        self,
        tokens: torch.Tensor,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens `[B, S, D]` -> the assembled rows `[B, T, D]`, and their q, k, v side by side `[B, T, 3 D]`."""
        norm = self.norm1 if self.pre_norm else None
        rows, s, residual = kernels.assemble_norm_project(
            tokens=tokens,
            prefix=None,
            suffix=suffix,
            present=present,
            mask_token=mask_token,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=self.norm1.eps,
            lora_a=self.qkv.lora_before_dropout,
            quantize=self.qkv.takes_quantized,
        )
        return residual, self.qkv.forward_projected(rows, s)

    def heads(self, parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Several of q, k, v side by side, `[B, T, P * D]` -> `[B, H, T, D / H]` of each."""
        batch, length, width = parts.shape
        head_dim = self.norm1.normalized_shape[0] // self.num_heads
        heads = parts.view(batch, length, width // (self.num_heads * head_dim), self.num_heads, head_dim)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    def complete(self, residual: torch.Tensor, attended: torch.Tensor, s: torch.Tensor | None = None) -> torch.Tensor:
        """residual `[B or 1, T, D]` and attention's output `[B, H, T, D / H]` -> the block's output `[B, T, D]`.

        `s` `[B, T, r]` is the low-rank product of `attended`, where it was computed together with it.
        """
        batch, heads, length, head_dim = attended.shape
        attended = self.o.forward_projected(attended.transpose(1, 2).reshape(batch, length, heads * head_dim), s)
        if not self.pre_norm:
            x = normalise(self.norm1, residual + attended)
            return normalise(self.norm2, x + self._mlp(x, None))
        x = residual + (attended if self.scale1 is None else attended * self.scale1)
        update = self._mlp(x, self.norm2)
        x = x + (update if self.scale2 is None else update * self.scale2)
        return x.clamp(-FP16_LIMIT, FP16_LIMIT) if self.clamps_fp16 and x.dtype == torch.float16 else x

    def _mlp(self, x: torch.Tensor, norm: nn.LayerNorm | None) -> torch.Tensor:
        rows, s, _ = kernels.assemble_norm_project(
            tokens=x,
            prefix=None,
            suffix=None,
            present=None,
            mask_token=None,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=self.norm2.eps,
            lora_a=self.fc1.lora_before_dropout,
            quantize=self.fc1.takes_quantized,
        )
        return self.fc2(self.act(self.fc1.forward_projected(rows, s)))
