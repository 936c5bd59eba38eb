"""Where each Hugging Face encoder keeps what the reference calls: its embedding stage, its layers, its linears."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

Embedded = tuple[Tensor, Tensor | None]  # tokens [B, S, D]; True = a real row [B, S], None = all are real


def embed_text(model: nn.Module, attention_mask: Tensor | None = None, **inputs: Tensor) -> Embedded:
    tokens = model.embeddings(**inputs)
    if hasattr(model, "embeddings_project"):  # ELECTRA, where the embedding is narrower than the layers
        tokens = model.embeddings_project(tokens)
    return tokens, None if attention_mask is None else attention_mask.bool()


def embed_clip_text(model: nn.Module, attention_mask: Tensor | None = None, **inputs: Tensor) -> Embedded:
    """Rows after the first real end-of-text token are padding, whether or not the attention mask says so."""
    ids, end_id = inputs["input_ids"], model.config.eos_token_id
    if end_id == 2:  # configs older than transformers 4.31: the end-of-text token is the highest id of its row
        end_id = ids.amax(dim=1, keepdim=True)
    given = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    is_end = (ids == end_id) * given
    return model.embeddings(**inputs), given.bool() & (is_end.cumsum(dim=1) - is_end == 0)


def embed_patches(model: nn.Module, **inputs: Tensor) -> Embedded:
    tokens = model.embeddings(**inputs)
    if hasattr(model, "pre_layrnorm"):  # CLIP; the spelling is Hugging Face's
        tokens = model.pre_layrnorm(tokens)
    return tokens, None


def embed_waveform(model: nn.Module, input_values: Tensor, attention_mask: Tensor | None = None) -> Embedded:
    """Convolutions, projection, zeros in the padding, positional convolution; post-norm encoders: LayerNorm."""
    features = model.feature_extractor(input_values).transpose(1, 2)
    tokens = model.feature_projection(features)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # Wav2Vec2 also returns the normalised features
    real = None
    if attention_mask is not None:
        real = model._get_feature_vector_attention_mask(features.shape[1], attention_mask).bool()
        tokens = tokens.masked_fill(~real[:, :, None], 0)
    tokens = tokens + model.encoder.pos_conv_embed(tokens)
    return tokens if model.config.do_stable_layer_norm else model.encoder.layer_norm(tokens), real


def embed_mel(model: nn.Module, input_features: Tensor, attention_mask: Tensor | None = None) -> Embedded:
    """Whisper knows no padding: its forward ignores the attention mask."""
    hidden = gelu(model.conv2(gelu(model.conv1(input_features))))
    return hidden.transpose(1, 2) + model.embed_positions.weight, None


def run_earlier_dinov2(layer: nn.Module, rows: Tensor, visible: Tensor) -> Tensor:
    """A layer of DINOv2 as of transformers 5.17, whose forward takes no mask."""
    attention, normed = layer.attention.attention, layer.norm1(rows)
    heads = (attention.num_attention_heads, attention.attention_head_size)
    q, k, v = (
        part(normed).unflatten(-1, heads).transpose(1, 2) for part in (attention.query, attention.key, attention.value)
    )
    attended = scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)
    rows = rows + layer.layer_scale1(layer.attention.output.dense(attended))
    return rows + layer.layer_scale2(layer.mlp(layer.norm2(rows)))


@dataclass(frozen=True)
class Family:
    """embed: (model, **inputs) -> Embedded. class_token: the "first" or "last" real row or the "mean" of real rows.

    parts: paths inside a layer of the linears q, k, v, o, fc1, fc2 and of the two LayerNorms.
    run: (layer, rows [B, L, D], visible [B, 1, L, L]) -> rows.
    """

    embed: Callable[..., Embedded]
    layers: str
    final_norm: str | None
    class_token: str
    parts: dict[str, str]
    causal: bool = False
    run: Callable[[nn.Module, Tensor, Tensor], Tensor] = nn.Module.__call__


PARTS = ("q", "k", "v", "o", "fc1", "fc2", "norm1", "norm2")


def parts(attention: str, mlp: str, norms: str) -> dict[str, str]:
    """Paths inside a layer, separated by spaces: of q, k, v, o, of fc1, fc2, and of the two LayerNorms."""
    return dict(zip(PARTS, f"{attention} {mlp} {norms}".split(), strict=True))


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
VIT_LINEARS = (
    "attention.q_proj attention.k_proj attention.v_proj attention.o_proj",
    "mlp.fc1 mlp.fc2",
)
VIT = Family(
    embed=embed_patches,
    layers="layers",
    final_norm="layernorm",
    class_token="first",
    parts=parts(*VIT_LINEARS, "layernorm_before layernorm_after"),
)
DINOV2 = replace(VIT, layers="encoder.layer", parts=parts(*VIT_LINEARS, "norm1 norm2"))
EARLIER_DINOV2 = replace(
    DINOV2,
    parts=parts(
        "attention.attention.query attention.attention.key attention.attention.value attention.output.dense",
        "mlp.fc1 mlp.fc2",
        "norm1 norm2",
    ),
    run=run_earlier_dinov2,
)
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
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "vit": VIT,
    "deit": VIT,
    "dinov2": DINOV2,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
    "audio-spectrogram-transformer": VIT,
    "wav2vec2": WAV2VEC2,
    "hubert": WAV2VEC2,
    "whisper": WHISPER,
}


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face encoder, by its config's model type."""
    family = FAMILIES[model.config.model_type]
    if getattr(model.config, "do_stable_layer_norm", False):  # Wav2Vec2, HuBERT: pre-norm layers, LayerNorm at the end
        family = replace(family, final_norm="encoder.layer_norm")
    if family is DINOV2 and hasattr(model.encoder.layer[0].attention, "attention"):
        family = EARLIER_DINOV2
    return family


def visible_rows(tokens: Tensor, padding_mask: Tensor | None, learned: int, read_only: bool, causal: bool) -> Tensor:
    """bool [B, 1, L, L], L = S + learned: may row i (query) see row j (key)?

    Real token rows are visible, padding is not. Learned rows stand after the tokens and are visible to all rows, or,
    if `read_only`, to none, themselves included. `causal`: besides, row i sees no row after i.
    """
    batch, length = tokens.shape[:2]
    if padding_mask is None:
        padding_mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    learned_keys = torch.full((batch, learned), not read_only, device=tokens.device)
    keys = torch.cat([padding_mask, learned_keys], dim=1)  # [B, L]
    visible = keys[:, None, None, :].repeat(1, 1, length + learned, 1)
    return visible.tril() if causal else visible
