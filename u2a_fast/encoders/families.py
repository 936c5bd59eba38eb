"""The supported families: where their embeddings, layers and norms are, and which names play which role."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import Family
from .embeddings import (
    clip_text_padding,
    embed_clip_text,
    embed_flexible_image,
    embed_ids,
    embed_image,
    embed_nomic_text,
    embed_protein,
    embed_siglip_text,
    embed_spectrogram,
    embed_square_image,
    embed_text,
    embed_video,
    embed_waveform,
    embed_whisper,
    embed_whole_image,
    flexible_image_padding,
    text_padding,
    waveform_padding,
)

Roles = dict[str, str | tuple[str, ...]]

BERT_ROLES: Roles = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
VIT_ROLES: Roles = {  # other names: DINOv2's before transformers 5.18, and all before 5
    "q": ("attention.q_proj", "attention.attention.query"),
    "k": ("attention.k_proj", "attention.attention.key"),
    "v": ("attention.v_proj", "attention.attention.value"),
    "o": ("attention.o_proj", "attention.output.dense"),
    "fc1": ("mlp.fc1", "intermediate.dense"),
    "fc2": ("mlp.fc2", "output.dense"),
}
EARLIER_VIT_ROLES = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
GATED_VIT_ROLES: Roles = VIT_ROLES | {
    "fc1": ("mlp.fc1", "mlp.up_proj"),
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "gate_up": "mlp.weights_in",
    "fc2": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
}
LLAMA_ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}
CLIP_ROLES: Roles = {
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
WAV2VEC2_STEM = {
    "feature_extractor": "feature_extractor",
    "feature_projection": "feature_projection",
    "positions": "encoder.pos_conv_embed",
}


POSITION_BIAS = "a relative position bias in attention"
# Of families that people ask for, why they have no spec.
REFUSED = {
    **dict.fromkeys(("T5Model", "T5EncoderModel", "MT5Model", "MT5EncoderModel", "UMT5EncoderModel"), POSITION_BIAS),
    **dict.fromkeys(("WavLMModel", "MPNetModel"), POSITION_BIAS),
    **dict.fromkeys(("DebertaModel", "DebertaV2Model"), "attention to relative positions"),
}


def swiglu(config: Any) -> str:
    """DINOv2's gated MLP has an activation of its own."""
    return "silu" if config.use_swiglu_ffn else config.hidden_act


def exact_gelu(config: Any) -> str:
    """ESM's layers compute this one, whatever the config names."""
    return "gelu"


def look_back(config: Any, layer: int) -> int | None:
    """Sliding windows of causal texts: that many tokens, the last of them oneself."""
    kinds = getattr(config, "layer_types", None)
    slides = config.sliding_window is not None and (kinds is None or kinds[layer] == "sliding_attention")
    return config.sliding_window - 1 if slides else None


def look_back_throughout(config: Any, layer: int) -> int | None:
    """Mistral's, of every layer, whatever its config says of types of layers."""
    return None if config.sliding_window is None else config.sliding_window - 1


def look_around(config: Any, layer: int) -> int | None:
    """ModernBERT's: so many tokens to either side."""
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


def gemma_scale(config: Any, head_width: int) -> float:
    return (head_width / config.query_pre_attn_scalar) ** 0.5


BERT = Family(
    name="BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ERNIE, Data2Vec text",
    classes=(
        *("BertModel", "RobertaModel", "ElectraModel", "XLMRobertaModel", "CamembertModel"),
        *("Data2VecTextModel", "ErnieModel"),
    ),
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
    classes=("Dinov2Model", "Dinov2WithRegistersModel"),
    stem={"embeddings": "embeddings", "final_norm": "layernorm"},
    layers="encoder.layer",
    roles=GATED_VIT_ROLES,
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    activation=swiglu,
    embed=embed_image,
)
DINOV3 = Family(
    name="DINOv3",
    classes=("DINOv3ViTModel",),
    stem={"embeddings": "embeddings", "final_norm": "norm"},
    layers="model.layer",
    roles=GATED_VIT_ROLES,
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    rotary="rope_embeddings",
    embed=embed_square_image,
)
VIT_MAE = replace(VIT, name="ViT-MAE", classes=("ViTMAEModel",), embed=embed_whole_image)
I_JEPA = replace(VIT, name="I-JEPA", classes=("IJepaModel",), class_token="mean")
DATA2VEC_VISION = Family(
    name="Data2Vec vision",
    classes=("Data2VecVisionModel",),
    stem={"embeddings": "embeddings", "final_norm": "layernorm"},
    layers="encoder.layer",
    roles=EARLIER_VIT_ROLES,
    norms=("layernorm_before", "layernorm_after"),
    scales=("lambda_1", "lambda_2"),
    class_token="mean",
    embed=embed_image,
    refuses=dict.fromkeys(("use_relative_position_bias", "use_shared_relative_position_bias"), POSITION_BIAS),
)
BEIT = replace(DATA2VEC_VISION, name="BEiT", classes=("BeitModel",), layers="layers", roles=VIT_ROLES)
VIDEO_MAE = Family(
    name="VideoMAE",
    classes=("VideoMAEModel",),
    stem={"embeddings": "embeddings", "final_norm": "layernorm"},
    layers="encoder.layer",
    roles=EARLIER_VIT_ROLES,
    norms=("layernorm_before", "layernorm_after"),
    class_token="mean",
    embed=embed_video,
)
DISTILBERT = Family(
    name="DistilBERT",
    classes=("DistilBertModel",),
    stem={"embeddings": "embeddings"},
    layers="transformer.layer",
    roles={
        **{"q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin", "o": "attention.out_lin"},
        **{"fc1": "ffn.lin1", "fc2": "ffn.lin2"},
    },
    norms=("sa_layer_norm", "output_layer_norm"),
    pre_norm=False,
    heads="n_heads",
    activation="activation",
    embed=embed_ids,
    padding=text_padding,
)
ESM = Family(
    name="ESM-2",
    classes=("EsmModel",),
    stem={"embeddings": "embeddings", "final_norm": "encoder.emb_layer_norm_after"},
    layers="encoder.layer",
    roles=BERT_ROLES,
    norms=("attention.LayerNorm", "LayerNorm"),
    activation=exact_gelu,
    embed=embed_protein,
    padding=text_padding,
    requires={"position_embedding_type": "absolute"},
)
ESM_ROTARY = replace(ESM, rotary="rotary_embeddings", requires={"position_embedding_type": "rotary"})
MODERNBERT = Family(
    name="ModernBERT",
    classes=("ModernBertModel",),
    stem={"embeddings": "embeddings", "final_norm": "final_norm"},
    layers="layers",
    roles={"qkv": "attn.Wqkv", "o": "attn.Wo", "gate_up": "mlp.Wi", "fc2": "mlp.Wo"},
    norms=("attn_norm", "mlp_norm"),
    activation="hidden_activation",
    rotary="rotary_emb",
    window=look_around,
    embed=embed_ids,
    padding=text_padding,
)
NOMIC_BERT = Family(
    name="NomicBERT",
    classes=("NomicBertModel",),
    stem={"embeddings": "embeddings"},
    layers="layers",
    roles=LLAMA_ROLES,
    norms=("post_attention_layernorm", "post_mlp_layernorm"),
    pre_norm=False,
    class_token="mean",
    rotary="rotary_emb",
    embed=embed_nomic_text,
    padding=text_padding,
)
EUROBERT = Family(
    name="EuroBERT",
    classes=("EuroBertModel",),
    stem={"embeddings": "embed_tokens", "final_norm": "norm"},
    layers="layers",
    roles=LLAMA_ROLES,
    norms=("input_layernorm", "post_attention_layernorm"),
    class_token="mean",
    rotary="rotary_emb",
    embed=embed_ids,
    padding=text_padding,
)
LLAMA = replace(EUROBERT, name="Llama", classes=("LlamaModel",), causal=True, class_token="last")
WINDOWED = replace(LLAMA, name="Qwen2", classes=("Qwen2Model",), window=look_back)
MISTRAL = replace(LLAMA, name="Mistral", classes=("MistralModel",), window=look_back_throughout)
QWEN3 = replace(WINDOWED, name="Qwen3", classes=("Qwen3Model",), head_norms=("self_attn.q_norm", "self_attn.k_norm"))
GEMMA3 = replace(
    QWEN3,
    name="Gemma 3 text",
    classes=("Gemma3TextModel",),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    update_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    held_as="language_model",
    query_scale=gemma_scale,
    activation="hidden_activation",
    requires={"use_bidirectional_attention": False},
    refuses={"attn_logit_softcapping": "a soft cap on attention"},
)
EMBEDDING_GEMMA = replace(
    GEMMA3,
    name="EmbeddingGemma",
    causal=False,
    class_token="mean",
    requires={"use_bidirectional_attention": True},
)
CLIP_TEXT = Family(
    name="CLIP text",
    classes=("CLIPTextModel",),
    stem={"embeddings": "embeddings", "final_norm": "final_layer_norm"},
    held_as="text_model",
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
    held_as="vision_model",
    layers="encoder.layers",
    roles=CLIP_ROLES,
    norms=("layer_norm1", "layer_norm2"),
    embed=embed_image,
)
SIGLIP_VISION = Family(
    name="SigLIP vision",
    classes=("SiglipVisionModel",),
    stem={"embeddings": "embeddings", "final_norm": "post_layernorm"},
    held_as="vision_model",
    layers="encoder.layers",
    roles=CLIP_ROLES,
    norms=("layer_norm1", "layer_norm2"),
    class_token="mean",
    embed=embed_image,
)
SIGLIP_TEXT = Family(
    name="SigLIP text",
    classes=("SiglipTextModel", "Siglip2TextModel"),
    stem={"embeddings": "embeddings", "final_norm": "final_layer_norm"},
    layers="encoder.layers",
    roles=CLIP_ROLES,
    norms=("layer_norm1", "layer_norm2"),
    class_token="last",
    embed=embed_siglip_text,
    padding=text_padding,
    held_as="text_model",
)
SIGLIP2_VISION = replace(
    SIGLIP_VISION,
    name="SigLIP 2 vision",
    classes=("Siglip2VisionModel",),
    embed=embed_flexible_image,
    padding=flexible_image_padding,
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
WAV2VEC2_STABLE = replace(
    WAV2VEC2,
    stem={**WAV2VEC2_STEM, "final_norm": "encoder.layer_norm"},
    pre_norm=True,
    requires={"do_stable_layer_norm": True},
)
WHISPER = Family(
    name="Whisper encoder",
    classes=("WhisperEncoder",),
    stem={"conv1": "conv1", "conv2": "conv2", "positions": "embed_positions", "final_norm": "layer_norm"},
    held_as="encoder",
    layers="layers",
    roles={**CLIP_ROLES, "fc1": "fc1", "fc2": "fc2"},
    norms=("self_attn_layer_norm", "final_layer_norm"),
    heads="encoder_attention_heads",
    activation="activation_function",
    class_token="mean",
    clamps_fp16=True,
    embed=embed_whisper,
)

FAMILIES = (
    *(BERT, DISTILBERT, MODERNBERT, NOMIC_BERT, EUROBERT, ESM, ESM_ROTARY, CLIP_TEXT, SIGLIP_TEXT),
    *(LLAMA, WINDOWED, MISTRAL, QWEN3, GEMMA3, EMBEDDING_GEMMA),
    *(VIT, DINOV2, DINOV3, CLIP_VISION, SIGLIP_VISION, SIGLIP2_VISION, VIT_MAE, I_JEPA, DATA2VEC_VISION, BEIT),
    *(VIDEO_MAE, AST, WAV2VEC2, WAV2VEC2_STABLE, WHISPER),
)
