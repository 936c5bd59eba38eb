"""Hugging Face's layers, made to take a mask of who sees whom and positions, and to stay in the dtype of their rows."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Rotation = tuple[Tensor, Tensor]  # cos, sin of the angles of all rows, [B, L, Dh]: both halves of Dh are alike


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), where Hugging Face's rounds to float32 whatever x is in."""

    def __init__(self, weight: Tensor, eps: float, offset: float):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(weight), eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide / (wide.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return (normed * (self.offset + self.weight.to(wide.dtype))).to(x.dtype)


class GatedMLP(nn.Module):
    """fc2(act(gate(x)) * up(x)), of a layer that keeps gate and up in one linear."""

    def __init__(self, gate_up: nn.Linear, fc2: nn.Linear, act: nn.Module):
        super().__init__()
        self.gate, self.up = split(gate_up, 2)
        self.fc2, self.act = fc2, act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.gate(x)) * self.up(x))


class RotaryAttention(nn.Module):
    """softmax(R q (R k)^T / sqrt(Dh)) v, where R turns a head by the angles of its row.

    In place of attention that turns in float32 whatever its rows are in, or keeps q, k and v in one linear.
    """

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Module, heads: int):
        super().__init__()
        self.q, self.k, self.v, self.o, self.heads = q, k, v, o, heads

    def forward(
        self, rows: Tensor, attention_mask: Tensor, position_embeddings: Rotation, **_: object
    ) -> tuple[Tensor, None]:
        q, k, v = (split_heads(part(rows), self.heads) for part in (self.q, self.k, self.v))
        q, k = turn(q, position_embeddings), turn(k, position_embeddings)
        return self.o(attend(q, k, v, attention_mask)), None


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """x [B, H, L, Dh]: the pair (x_i, x_{i + Dh/2}) turns by angle i of its row."""
    cos, sin = (part[:, None] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, H Dh] -> [B, H, L, Dh]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """[B, H, L, Dh] and bool [B, 1, L, L] -> [B, L, H Dh]"""
    return scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)


def split(linear: nn.Linear, count: int) -> list[nn.Linear]:
    """A linear whose outputs stand side by side, as `count` linears of equal width."""
    biases = [None] * count if linear.bias is None else linear.bias.chunk(count)
    parts = []
    for weight, bias in zip(linear.weight.chunk(count), biases, strict=True):
        part = nn.Linear(linear.in_features, len(weight), bias=bias is not None, device="meta")
        part.weight = nn.Parameter(weight.clone())
        part.bias = None if bias is None else nn.Parameter(bias.clone())
        parts.append(part)
    return parts


def prepare(layers: nn.ModuleList, heads: int, norm_offset: float) -> None:
    """Replace what Hugging Face's layers have in them that is fused, or rounds to float32."""
    for layer in layers:
        for path, module in [*layer.named_modules()]:
            name = type(module).__name__
            if name == "ModernBertAttention":
                q, k, v = split(module.Wqkv, 3)
                layer.set_submodule(path, RotaryAttention(q, k, v, module.Wo, heads))
            elif name == "EsmSelfAttention" and module.position_embedding_type == "rotary":
                own = RotaryAttention(module.query, module.key, module.value, nn.Identity(), heads)
                layer.set_submodule(path, own)
            elif name == "ModernBertMLP":
                layer.set_submodule(path, GatedMLP(module.Wi, module.Wo, module.act))
            elif hasattr(module, "weights_in"):  # DINOv2's SwiGLU before transformers 5.18
                layer.set_submodule(path, GatedMLP(module.weights_in, module.weights_out, nn.SiLU()))
            elif name.endswith("RMSNorm"):
                layer.set_submodule(path, exact_norm(module, norm_offset))


def exact_norm(norm: nn.Module, offset: float) -> nn.Module:
    """Hugging Face's norm, an RMSNorm by ours."""
    if not type(norm).__name__.endswith("RMSNorm"):
        return norm
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return RMSNorm(norm.weight.detach(), eps, offset)


def run_layer(layer: nn.Module, rows: Tensor, visible: Tensor, rotation: Rotation | None) -> Tensor:
    """Rows [B, L, D] through a layer of Hugging Face; visible bool [B, 1, L, L]."""
    positions = {} if rotation is None else {"position_embeddings": rotation}
    return layer(rows, attention_mask=visible, **positions)


def run_dinov3(layer: nn.Module, rows: Tensor, visible: Tensor, rotation: Rotation) -> Tensor:
    """Its angles are for all heads: [B, 1, L, Dh]."""
    return run_layer(layer, rows, visible, tuple(part[:, None] for part in rotation))


def run_earlier_dinov2(layer: nn.Module, rows: Tensor, visible: Tensor, rotation: None) -> Tensor:
    """A layer of DINOv2 as of transformers 5.17, whose forward takes no mask."""
    attended = attend_unmasked(layer.attention.attention, layer.norm1(rows), visible)
    rows = rows + layer.layer_scale1(layer.attention.output.dense(attended))
    return rows + layer.layer_scale2(layer.mlp(layer.norm2(rows)))


def run_videomae(layer: nn.Module, rows: Tensor, visible: Tensor, rotation: None) -> Tensor:
    """Its forward takes no mask."""
    attended = attend_unmasked(layer.attention.attention, layer.layernorm_before(rows), visible)
    rows = rows + layer.attention.output.dense(attended)
    return layer.output(layer.intermediate(layer.layernorm_after(rows)), rows)


def run_data2vec(layer: nn.Module, rows: Tensor, visible: Tensor, rotation: None) -> Tensor:
    """Its forward takes a bias of attention's scores, and no mask."""
    bias = torch.zeros_like(visible, dtype=rows.dtype).masked_fill(~visible, float("-inf"))
    return layer(rows, relative_position_bias=bias)[0]


def attend_unmasked(attention: nn.Module, rows: Tensor, visible: Tensor) -> Tensor:
    """By the linears of a module whose own forward takes no mask: rows [B, L, D] -> [B, L, D]."""
    parts = (attention.query, attention.key, attention.value)
    q, k, v = (split_heads(part(rows), attention.num_attention_heads) for part in parts)
    return attend(q, k, v, visible)
