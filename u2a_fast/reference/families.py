"""Where each Hugging Face encoder keeps what the reference calls: its embedding stage, its layers, its linears."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .embeddings import (
    Embedded,
    embed_all_patches,
    embed_clip_text,
    embed_frames,
    embed_mel,
    embed_patch_rows,
    embed_patches,
    embed_protein,
    embed_text,
    embed_tokens,
    embed_waveform,
)
from .layers import Rotation, run_data2vec, run_dinov3, run_earlier_dinov2, run_layer, run_videomae


def text_angles(angles: nn.Module, config: Any, kind: str | None, tokens: Tensor, places: Tensor) -> Rotation:
    """Of rows at `places` [B, L] of their texts; where local and global layers differ, in those of a kind."""
    takes_kind = kind is not None and "layer_type" in inspect.signature(angles.forward).parameters
    return angles(tokens, places, kind) if takes_kind else angles(tokens, places)


def picture_angles(angles: nn.Module, config: Any, kind: str | None, tokens: Tensor, places: Tensor) -> Rotation:
    """DINOv3: patches of a square picture turn by their places in it; class, register and learned rows do not."""
    first = 1 + config.num_register_tokens
    patch = config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    side = math.isqrt((tokens.shape[1] - first) * height * width)
    of_patches = angles(tokens.new_empty(1, 3, side, side))  # cos, sin [patches, Dh]
    shape = *places.shape, of_patches[0].shape[1]
    cos, sin = tokens.new_ones(shape), tokens.new_zeros(shape)
    cos[:, first : tokens.shape[1]], sin[:, first : tokens.shape[1]] = of_patches
    return cos, sin


@dataclass(frozen=True)
class Family:
    """embed: (model, **inputs) -> Embedded. class_token: the "first" or "last" real row or the "mean" of real rows.

    parts: paths inside a layer of the linears q, k, v, o, fc1 (or gate and up), fc2 and of the norms before them.
    run: (layer, rows [B, L, D], visible [B, 1, L, L], cos and sin or None) -> rows.
    rotary, angles: path of Hugging Face's module of angles, and how it is asked.
    window: (config, index of a layer) -> how far apart two tokens may be that see each other; None: any distance.
    """

    embed: Callable[..., Embedded]
    layers: str
    final_norm: str | None
    class_token: str
    parts: dict[str, str]
    causal: bool = False
    run: Callable[..., Tensor] = run_layer
    rotary: str | None = None
    angles: Callable[..., Rotation] = text_angles
    window: Callable[[Any, int], int | None] = lambda config, index: None
    norm_offset: float = 0.0


PARTS = ("q", "k", "v", "o", "fc1", "fc2", "norm1", "norm2")
GATED_PARTS = ("q", "k", "v", "o", "gate", "up", "fc2", "norm1", "norm2")


def parts(attention: str, mlp: str, norms: str) -> dict[str, str]:
    """Paths inside a layer, separated by spaces: of q, k, v, o, of the MLP, and of the two norms."""
    paths = f"{attention} {mlp} {norms}".split()
    return dict(zip(PARTS if len(paths) == len(PARTS) else GATED_PARTS, paths, strict=True))


def look_back(config: Any, index: int) -> int | None:
    """Hugging Face's windows of causal texts count the token itself."""
    slides = config.layer_types[index] == "sliding_attention" if getattr(config, "layer_types", None) else True
    return config.sliding_window - 1 if slides and config.sliding_window is not None else None


def look_back_throughout(config: Any, index: int) -> int | None:
    """Mistral has the same window in every layer, and ignores `layer_types`."""
    return None if config.sliding_window is None else config.sliding_window - 1


def look_around(config: Any, index: int) -> int | None:
    """ModernBERT's is the distance to either side."""
    return config.sliding_window if config.layer_types[index] == "sliding_attention" else None


BERT = Family(
    embed=embed_text,
    layers="encoder.layer",
    final_norm=None,
    class_token="first",
    parts=parts(
        "attention.self.query attention.self.key attention.self.value attention.output.dense",
        "intermediate.dense output.dense",
        "attention.output.LayerNorm output.LayerNorm",
    ),
)
DISTILBERT = replace(
    BERT,
    layers="transformer.layer",
    parts=parts(
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
        "ffn.lin1 ffn.lin2",
        "sa_layer_norm output_layer_norm",
    ),
)
ESM = replace(
    BERT,
    embed=embed_protein,
    final_norm="encoder.emb_layer_norm_after",
    parts=BERT.parts | {"norm1": "attention.LayerNorm", "norm2": "LayerNorm"},
)
ESM_ROTARY = replace(
    ESM,
    parts=ESM.parts | {"q": "attention.self.q", "k": "attention.self.k", "v": "attention.self.v"},
    rotary="rotary_embeddings",
)
MODERNBERT = Family(
    embed=embed_text,
    layers="layers",
    final_norm="final_norm",
    class_token="first",
    parts=parts("attn.q attn.k attn.v attn.o", "mlp.gate mlp.up mlp.fc2", "attn_norm mlp_norm"),
    rotary="rotary_emb",
    window=look_around,
)
LLAMA = Family(
    embed=embed_tokens,
    layers="layers",
    final_norm="norm",
    class_token="last",
    parts=parts(
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj mlp.down_proj",
        "input_layernorm post_attention_layernorm",
    ),
    causal=True,
    rotary="rotary_emb",
)
WINDOWED = replace(LLAMA, window=look_back)
MISTRAL = replace(LLAMA, window=look_back_throughout)
GEMMA = replace(WINDOWED, parts=LLAMA.parts | {"norm2": "pre_feedforward_layernorm"}, norm_offset=1.0)
EUROBERT = replace(LLAMA, class_token="mean", causal=False)
NOMIC_BERT = replace(
    EUROBERT,
    embed=embed_text,
    final_norm=None,
    parts=LLAMA.parts | {"norm1": "post_attention_layernorm", "norm2": "post_mlp_layernorm"},
)
VIT_LINEARS = (
    "attention.q_proj attention.k_proj attention.v_proj attention.o_proj",
    "mlp.fc1 mlp.fc2",
)
EARLIER_VIT_ATTENTION = (
    "attention.attention.query attention.attention.key attention.attention.value attention.output.dense"
)
VIT = Family(
    embed=embed_patches,
    layers="layers",
    final_norm="layernorm",
    class_token="first",
    parts=parts(*VIT_LINEARS, "layernorm_before layernorm_after"),
)
VIT_MAE = replace(VIT, embed=embed_all_patches)
I_JEPA = replace(VIT, class_token="mean")
DINOV2 = replace(VIT, layers="encoder.layer", parts=parts(*VIT_LINEARS, "norm1 norm2"))
EARLIER_DINOV2 = replace(
    DINOV2,
    parts=parts(EARLIER_VIT_ATTENTION, "mlp.fc1 mlp.fc2", "norm1 norm2"),
    run=run_earlier_dinov2,
)
DINOV3 = replace(
    DINOV2,
    layers="model.layer",
    final_norm="norm",
    parts=parts(VIT_LINEARS[0], "mlp.up_proj mlp.down_proj", "norm1 norm2"),
    run=run_dinov3,
    rotary="rope_embeddings",
    angles=picture_angles,
)
DATA2VEC_VISION = replace(
    I_JEPA,
    layers="encoder.layer",
    parts=parts(EARLIER_VIT_ATTENTION, "intermediate.dense output.dense", "layernorm_before layernorm_after"),
    run=run_data2vec,
)
VIDEO_MAE = replace(DATA2VEC_VISION, embed=embed_frames, run=run_videomae)
CLIP_ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"
CLIP_VISION = Family(
    embed=embed_patches,
    layers="encoder.layers",
    final_norm=None,  # `post_layernorm` belongs to Hugging Face's pooler: its last_hidden_state has not passed it
    class_token="first",
    parts=parts(CLIP_ATTENTION, "mlp.fc1 mlp.fc2", "layer_norm1 layer_norm2"),
)
CLIP_TEXT = replace(CLIP_VISION, embed=embed_clip_text, final_norm="final_layer_norm", class_token="last", causal=True)
SIGLIP_VISION = replace(CLIP_VISION, final_norm="post_layernorm", class_token="mean")
SIGLIP2_VISION = replace(SIGLIP_VISION, embed=embed_patch_rows)
SIGLIP_TEXT = replace(CLIP_VISION, embed=embed_text, final_norm="final_layer_norm", class_token="last")
WAV2VEC2 = Family(
    embed=embed_waveform,
    layers="encoder.layers",
    final_norm=None,
    class_token="mean",
    parts=parts(
        "attention.q_proj attention.k_proj attention.v_proj attention.out_proj",
        "feed_forward.intermediate_dense feed_forward.output_dense",
        "layer_norm final_layer_norm",
    ),
)
WHISPER = Family(
    embed=embed_mel,
    layers="layers",
    final_norm="layer_norm",
    class_token="mean",
    parts=parts(CLIP_ATTENTION, "fc1 fc2", "self_attn_layer_norm final_layer_norm"),
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie", "data2vec-text"), BERT),
    "distilbert": DISTILBERT,
    "esm": ESM,
    "modernbert": MODERNBERT,
    "nomic_bert": NOMIC_BERT,
    "eurobert": EUROBERT,
    "llama": LLAMA,
    **dict.fromkeys(("qwen2", "qwen3"), WINDOWED),
    "mistral": MISTRAL,
    "gemma3_text": GEMMA,
    **dict.fromkeys(("vit", "deit", "audio-spectrogram-transformer"), VIT),
    "vit_mae": VIT_MAE,
    **dict.fromkeys(("ijepa", "beit"), I_JEPA),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), DINOV2),
    "dinov3_vit": DINOV3,
    "data2vec-vision": DATA2VEC_VISION,
    "videomae": VIDEO_MAE,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
    "siglip2_vision_model": SIGLIP2_VISION,
    **dict.fromkeys(("siglip_text_model", "siglip2_text_model"), SIGLIP_TEXT),
    **dict.fromkeys(("wav2vec2", "hubert"), WAV2VEC2),
    "whisper": WHISPER,
}


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face encoder, by its config."""
    config = model.config
    family = FAMILIES[config.model_type]
    if getattr(config, "do_stable_layer_norm", False):  # Wav2Vec2, HuBERT: pre-norm layers, LayerNorm at the end
        family = replace(family, final_norm="encoder.layer_norm")
    if family is ESM and config.position_embedding_type == "rotary":
        family = ESM_ROTARY
    if family is GEMMA and config.use_bidirectional_attention:  # EmbeddingGemma
        family = replace(GEMMA, causal=False, class_token="mean")
    if family is DINOV2 and hasattr(model.encoder.layer[0].attention, "attention"):
        family = EARLIER_DINOV2
    mlp = getattr(model.get_submodule(family.layers)[0], "mlp", None)
    if hasattr(mlp, "gate_proj") and "gate" not in family.parts:  # DINOv2 and DINOv3 come with and without gates
        return with_gate(family, "mlp.gate_proj mlp.up_proj mlp.down_proj")
    if hasattr(mlp, "weights_in"):
        return with_gate(family, "mlp.gate mlp.up mlp.fc2")
    return family


def with_gate(family: Family, mlp: str) -> Family:
    attention, norms = (" ".join(family.parts[name] for name in names) for names in ("qkvo", ("norm1", "norm2")))
    return replace(family, parts=parts(attention, mlp, norms))


def places_of(padding_mask: Tensor, learned: int) -> Tensor:
    """int64 [B, L]: the column of each token; learned rows take the places behind the last real one."""
    columns = torch.arange(padding_mask.shape[1], device=padding_mask.device).expand_as(padding_mask)
    last = (columns * padding_mask).amax(dim=1, keepdim=True)
    return torch.cat([columns, last + 1 + torch.arange(learned, device=last.device)], dim=1)


def visible_rows(
    padding_mask: Tensor, learned: int, read_only: bool, causal: bool, window: int | None = None
) -> Tensor:
    """bool [B, 1, L, L], L = S + learned: may row i (query) see row j (key)?

    Real token rows are visible, padding is not. Learned rows stand after the tokens and are visible to all rows, or,
    if `read_only`, to none, themselves included. `causal`: besides, row i sees no row after i. `window`: besides, a
    token sees no token whose column is further away; learned rows see and are seen without it.
    """
    batch, length = padding_mask.shape
    learned_keys = torch.full((batch, learned), not read_only, device=padding_mask.device)
    keys = torch.cat([padding_mask, learned_keys], dim=1)  # [B, L]
    visible = keys[:, None, None, :].repeat(1, 1, length + learned, 1)
    if window is not None:
        columns = torch.arange(length, device=padding_mask.device)
        visible[:, :, :length, :length] &= (columns[:, None] - columns).abs() <= window
    return visible.tril() if causal else visible
