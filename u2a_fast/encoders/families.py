"""The supported families: where their embeddings, layers and norms are, and which names play q, k, v, o, fc1, fc2."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, pad

from .base import EmbedResult, Encoder, Family


# ------------------------------------------------------------------------------------------------ embedding stages
def embed_text(
    encoder: Encoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> EmbedResult:
    tokens = encoder.stem["embeddings"](input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
    if "embeddings_project" in encoder.stem:  # ELECTRA with embeddings narrower than its blocks
        tokens = encoder.stem["embeddings_project"](tokens)
    return tokens, text_padding(encoder, attention_mask=attention_mask)


def text_padding(
    encoder: Encoder, attention_mask: torch.Tensor | None = None, **others: torch.Tensor
) -> torch.Tensor | None:
    return None if attention_mask is None else attention_mask.bool()


def embed_clip_text(
    encoder: Encoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> EmbedResult:
    tokens = encoder.stem["embeddings"](input_ids, position_ids=position_ids)
    return tokens, clip_text_padding(encoder, input_ids, attention_mask)


def clip_text_padding(
    encoder: Encoder, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: torch.Tensor
) -> torch.Tensor:
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    eos = encoder.config.eos_token_id
    # Configs from before transformers 4.31 say 2 and mean the highest id. Rows after the end of text are padding; so
    # are those before the text that hold the same id, which CLIP pads with.
    end = real & (input_ids == (input_ids.amax(dim=1, keepdim=True) if eos == 2 else eos))
    after_end = end.int().cumsum(dim=1) - end.int() > 0
    return real & ~after_end


def embed_image(encoder: Encoder, pixel_values: torch.Tensor, **options: bool) -> EmbedResult:
    tokens = encoder.stem["embeddings"](pixel_values, **options)
    if "pre_norm" in encoder.stem:
        tokens = encoder.stem["pre_norm"](tokens)
    return tokens, None


def embed_spectrogram(encoder: Encoder, input_values: torch.Tensor) -> EmbedResult:
    return encoder.stem["embeddings"](input_values), None


def embed_waveform(
    encoder: Encoder, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> EmbedResult:
    stem, shortest = encoder.stem, _samples_of_a_row(encoder)
    input_values = pad(input_values, (0, max(0, shortest - input_values.shape[1])))
    features = stem["feature_extractor"](input_values).transpose(1, 2)  # [B, S, C]
    tokens = stem["feature_projection"](features)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # [B, S, D]
    real = waveform_padding(encoder, input_values, attention_mask)
    if real is not None:
        tokens = torch.where(real[:, :, None], tokens, 0)  # the positional convolution must not see padding
    tokens = tokens + stem["positions"](tokens)
    return stem["post_norm"](tokens) if "post_norm" in stem else tokens, real


def waveform_padding(
    encoder: Encoder, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    shortest = _samples_of_a_row(encoder)
    rows, lengths = max(input_values.shape[1], shortest), attention_mask.sum(dim=1).clamp(min=shortest)
    for kernel, stride in zip(encoder.config.conv_kernel, encoder.config.conv_stride, strict=True):
        rows = (rows - kernel) // stride + 1
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
    return torch.arange(rows, device=lengths.device) < lengths[:, None]


def _samples_of_a_row(encoder: Encoder) -> int:
    """The shortest waveform from which the convolutions make a row."""
    shortest = 1
    for kernel, stride in zip(reversed(encoder.config.conv_kernel), reversed(encoder.config.conv_stride), strict=True):
        shortest = (shortest - 1) * stride + kernel
    return shortest


def embed_whisper(
    encoder: Encoder, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> EmbedResult:
    stem, positions = encoder.stem, encoder.stem["positions"].weight
    frames = 2 * positions.shape[0]
    if input_features.shape[-1] != frames:
        raise ValueError(
            f"this Whisper encoder takes {frames} mel frames, not {input_features.shape[-1]}: "
            "let its own feature extractor pad the clip"
        )
    hidden = gelu(stem["conv2"](gelu(stem["conv1"](input_features))))  # [B, D, S]
    return hidden.transpose(1, 2) + positions, None  # Whisper ignores the padding mask of its mel frames


# ------------------------------------------------------------------------------------------------------- the specs
BERT_ROLES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
VIT_ROLES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
CLIP_ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
WAV2VEC2_ROLES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.out_proj",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
}
# Where transformers kept a linear before it took the name above (DINOv2's in 5.17).
EARLIER_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
WAV2VEC2_STEM = {
    "feature_extractor": "feature_extractor",
    "feature_projection": "feature_projection",
    "positions": "encoder.pos_conv_embed",
}

BERT = Family(
    name="BERT, RoBERTa, ELECTRA",
    classes=("BertModel", "RobertaModel", "ElectraModel", "XLMRobertaModel", "CamembertModel"),
    stem={"embeddings": "embeddings", "embeddings_project": "embeddings_project"},
    layers="encoder.layer",
    roles=BERT_ROLES,
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    pre_norm=False,
    embed=embed_text,
    padding=text_padding,
)
VIT = Family(
    name="ViT, DeiT",
    classes=("ViTModel", "DeiTModel"),
    stem={"embeddings": "embeddings", "final_norm": "layernorm"},
    layers="layers",
    roles=VIT_ROLES,
    norms=("layernorm_before", "layernorm_after"),
    embed=embed_image,
)
DINOV2 = Family(
    name="DINOv2",
    classes=("Dinov2Model",),
    stem={"embeddings": "embeddings", "final_norm": "layernorm"},
    layers="encoder.layer",
    roles=VIT_ROLES,
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    embed=embed_image,
)
CLIP_TEXT = Family(
    name="CLIP text",
    classes=("CLIPTextModel",),
    stem={"embeddings": "embeddings", "final_norm": "final_layer_norm"},
    layers="encoder.layers",
    roles=CLIP_ROLES,
    norms=("layer_norm1", "layer_norm2"),
    class_token="last",
    causal=True,
    embed=embed_clip_text,
    padding=clip_text_padding,
)
CLIP_VISION = Family(
    name="CLIP vision",
    classes=("CLIPVisionModel",),
    # No final norm: Hugging Face applies `post_layernorm` to its pooled row only.
    stem={"embeddings": "embeddings", "pre_norm": "pre_layrnorm"},
    layers="encoder.layers",
    roles=CLIP_ROLES,
    norms=("layer_norm1", "layer_norm2"),
    embed=embed_image,
)
SIGLIP_VISION = Family(
    name="SigLIP vision",
    classes=("SiglipVisionModel",),
    stem={"embeddings": "embeddings", "final_norm": "post_layernorm"},
    layers="encoder.layers",
    roles=CLIP_ROLES,
    norms=("layer_norm1", "layer_norm2"),
    class_token="mean",
    embed=embed_image,
)
AST = Family(
    name="AST",
    classes=("ASTModel",),
    stem={"embeddings": "embeddings", "final_norm": "layernorm"},
    layers="layers",
    roles=VIT_ROLES,
    norms=("layernorm_before", "layernorm_after"),
    embed=embed_spectrogram,
)
WAV2VEC2 = Family(
    name="Wav2Vec2, HuBERT",
    classes=("Wav2Vec2Model", "HubertModel"),
    stem={**WAV2VEC2_STEM, "post_norm": "encoder.layer_norm"},
    layers="encoder.layers",
    roles=WAV2VEC2_ROLES,
    norms=("layer_norm", "final_layer_norm"),
    pre_norm=False,
    class_token="mean",
    embed=embed_waveform,
    padding=waveform_padding,
    requires={"do_stable_layer_norm": False},
)
WAV2VEC2_STABLE = Family(
    name="Wav2Vec2, HuBERT",
    classes=("Wav2Vec2Model", "HubertModel"),
    stem={**WAV2VEC2_STEM, "final_norm": "encoder.layer_norm"},
    layers="encoder.layers",
    roles=WAV2VEC2_ROLES,
    norms=("layer_norm", "final_layer_norm"),
    class_token="mean",
    embed=embed_waveform,
    padding=waveform_padding,
    requires={"do_stable_layer_norm": True},
)
WHISPER = Family(
    name="Whisper encoder",
    classes=("WhisperEncoder",),
    stem={"conv1": "conv1", "conv2": "conv2", "positions": "embed_positions", "final_norm": "layer_norm"},
    layers="layers",
    roles={**CLIP_ROLES, "fc1": "fc1", "fc2": "fc2"},
    norms=("self_attn_layer_norm", "final_layer_norm"),
    heads="encoder_attention_heads",
    activation="activation_function",
    class_token="mean",
    clamps_fp16=True,
    embed=embed_whisper,
)

FAMILIES = (BERT, VIT, DINOV2, CLIP_TEXT, CLIP_VISION, SIGLIP_VISION, AST, WAV2VEC2, WAV2VEC2_STABLE, WHISPER)
