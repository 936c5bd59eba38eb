"""Tiny, odd configurations of every supported family: name -> Hugging Face's model class, config class, settings."""

import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

WIDTH, END_OF_TEXT = 32, 98

LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
TEXT = dict(vocab_size=99, max_position_embeddings=20, **LAYERS)
PADS_WITH_ONE = TEXT | {"pad_token_id": 1}
IDS = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": END_OF_TEXT}
LLAMA = TEXT | IDS | {"num_key_value_heads": 2, "head_dim": 6}
GEMMA = LLAMA | {"head_dim": 10, "sliding_window": 3, "query_pre_attn_scalar": 7, "num_key_value_heads": 1}
CLIP_TEXT = TEXT | {"bos_token_id": 0, "pad_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
IMAGE = dict(image_size=24, patch_size=8, **LAYERS)
BEIT = IMAGE | {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.1}
SPEECH = dict(
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2,
    **LAYERS,
)
WHISPER = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "num_mel_bins": 12,
    "max_source_positions": 9,
}


def _of(name: str, settings: dict) -> tuple:
    """Hugging Face's classes of a name: `Bert` -> BertModel, BertConfig."""
    return getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config"), settings


TEXTS = {
    "bert": _of("Bert", TEXT),
    "roberta": _of("Roberta", PADS_WITH_ONE),
    "electra": _of("Electra", TEXT | {"embedding_size": 24}),
    "xlm_roberta": _of("XLMRoberta", PADS_WITH_ONE),
    "camembert": _of("Camembert", PADS_WITH_ONE),
    "data2vec_text": _of("Data2VecText", PADS_WITH_ONE),
    "ernie": _of("Ernie", TEXT),
    "distilbert": _of("DistilBert", TEXT),
    "esm": _of("Esm", PADS_WITH_ONE | {"mask_token_id": 2, "position_embedding_type": "absolute"}),
    "esm_rotary": _of(
        "Esm",
        PADS_WITH_ONE
        | {"mask_token_id": 7, "position_embedding_type": "rotary", "token_dropout": True, "rope_theta": 100.0}
        | {"emb_layer_norm_before": True},
    ),
    "modernbert": _of(
        "ModernBert", TEXT | IDS | {"global_attn_every_n_layers": 2, "local_attention": 4, "norm_bias": True}
    ),
    "nomic_bert": _of("NomicBert", TEXT | {"head_dim": 8}),
    "eurobert": _of("EuroBert", LLAMA | {"mask_token_id": 2}),
    "clip_text": _of("CLIPText", CLIP_TEXT),
    "siglip_text": _of("SiglipText", CLIP_TEXT | {"pad_token_id": 1}),
    "siglip2_text": _of("Siglip2Text", CLIP_TEXT | {"pad_token_id": 1, "hidden_act": "gelu"}),
    "llama": _of("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": _of("Qwen2", TEXT | IDS | {"num_key_value_heads": 1}),
    "mistral": _of("Mistral", LLAMA | {"sliding_window": 3}),
    "qwen3": _of("Qwen3", LLAMA),
    "qwen3_windows": _of("Qwen3", LLAMA | {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}),
    "gemma3": _of("Gemma3Text", GEMMA | {"sliding_window_pattern": 2}),
    "embedding_gemma": _of(
        "Gemma3Text", GEMMA | {"use_bidirectional_attention": True, "sliding_window": 4, "sliding_window_pattern": 2}
    ),
}
IMAGES = {
    "vit": _of("ViT", IMAGE),
    "deit": _of("DeiT", IMAGE | {"num_attention_heads": 2}),
    "vit_mae": _of("ViTMAE", IMAGE | {"mask_ratio": 0.0}),
    "ijepa": _of("IJepa", IMAGE),
    "dinov2": _of("Dinov2", IMAGE | {"mlp_ratio": 2}),
    "dinov2_gated": _of("Dinov2", IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_registers": _of("Dinov2WithRegisters", IMAGE | {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov3": _of("DINOv3ViT", IMAGE | {"num_register_tokens": 2}),
    "dinov3_gated": _of("DINOv3ViT", IMAGE | {"use_gated_mlp": True, "hidden_act": "silu", "num_attention_heads": 2}),
    "beit": _of("Beit", BEIT | {"use_mean_pooling": False}),
    "beit_unscaled": _of("Beit", BEIT | {"layer_scale_init_value": 0.0}),
    "data2vec_vision": _of("Data2VecVision", BEIT),
    "clip_vision": _of("CLIPVision", IMAGE),
    "siglip_vision": _of("SiglipVision", IMAGE),
}
OTHERS = {
    "siglip2_vision": _of("Siglip2Vision", LAYERS | {"num_patches": 16, "patch_size": 4}),
    "videomae": _of("VideoMAE", IMAGE | {"num_frames": 4, "tubelet_size": 2, "use_mean_pooling": False}),
    "ast": _of("AST", LAYERS | {"max_length": 56, "num_mel_bins": 24}),
    "whisper": (WhisperEncoder, transformers.WhisperConfig, WHISPER),
}
SPEECHES = {
    "wav2vec2": _of("Wav2Vec2", SPEECH),
    "wav2vec2_stable": _of(
        "Wav2Vec2", SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    ),
    "hubert": _of("Hubert", SPEECH),
}
CONFIGS = TEXTS | IMAGES | OTHERS | SPEECHES

# The common names, where a family spells them in its own way.
SPELLING = {
    "whisper": {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    },
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    },
}
