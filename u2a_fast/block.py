"""The transformer block of every supported encoder: the only place where kernels meet weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import layer_norm
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from . import kernels
from .lora import LoraLinear


class Block(GradientCheckpointingLayer):
    """Self-attention and MLP, each with a residual.

    ::

        pre-norm:   x = x + scale1 * o(attend(qkv(norm1(x))))     x = x + scale2 * fc2(act(fc1(norm2(x))))
        post-norm:  x = norm1(x + o(attend(qkv(x))))              x = norm2(x + fc2(act(fc1(x))))

    Its parts are public because PMF and read-only prompts compose them differently: `project` (norm and q, k, v),
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
    ):
        super().__init__()
        self.qkv, self.o, self.fc1, self.fc2 = qkv, o, fc1, fc2
        self.norm1, self.norm2 = norm1, norm2
        self.scale1 = None if scale1 is None else nn.Parameter(scale1.detach(), requires_grad=False)
        self.scale2 = None if scale2 is None else nn.Parameter(scale2.detach(), requires_grad=False)
        self.num_heads, self.pre_norm, self.causal = num_heads, pre_norm, causal
        self.activation = activation
        self.act = ACT2FN[activation]

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
    ) -> torch.Tensor:
        """tokens `[B, S, D]` -> `[B, S + Q, D]`.

        Args:
            lengths: `[B]`, keys that are real among the token rows; None: all.
            suffix: `[Q, D]`, learned rows to append in this block.
            suffix_rows: how many of the rows in `tokens` are learned rows appended by a block before.
            present: bool `[B]`; the token rows of absent samples are never read, `mask_token` `[D]` stands in.
        """
        residual, q, k, v = self.project(tokens, suffix, present, mask_token)
        if suffix is not None:
            suffix_rows = suffix_rows + suffix.shape[0]
        return self.complete(residual, kernels.attention(q, k, v, lengths, suffix=suffix_rows, causal=self.causal))

    def project(
        self,
        tokens: torch.Tensor,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens `[B, S, D]` -> the assembled rows `[B, T, D]`, and their q, k, v `[B, H, T, D / H]`."""
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
        )
        qkv = self.qkv.forward_projected(rows, s)  # [B, T, 3 D]
        batch, length, width = qkv.shape
        heads = qkv.view(batch, length, 3, self.num_heads, width // (3 * self.num_heads))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D / H] each
        return residual, q, k, v

    def complete(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """residual `[B, T, D]` and attention's output `[B, H, T, D / H]` -> the block's output `[B, T, D]`."""
        batch, heads, length, head_dim = attended.shape
        attended = self.o(attended.transpose(1, 2).reshape(batch, length, heads * head_dim))
        if not self.pre_norm:
            x = self._norm(self.norm1, residual + attended)
            return self._norm(self.norm2, x + self._mlp(x, None))
        x = residual + (attended if self.scale1 is None else attended * self.scale1)
        update = self._mlp(x, self.norm2)
        return x + (update if self.scale2 is None else update * self.scale2)

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
        )
        return self.fc2(self.act(self.fc1.forward_projected(rows, s)))

    @staticmethod
    def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
