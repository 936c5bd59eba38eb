"""Tiny random encoders of every supported family, their inputs, and what Hugging Face itself says about them.

Every parameter is drawn at random (LayerNorm weights around 1, LayerScale and every bias included), so that no scale,
shift or class token hides behind a one or a zero.
"""

import torch
import transformers
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

WIDTH, TEXT_LENGTH, SAMPLES, END_OF_TEXT = 32, 7, 200, 98

LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
TEXT = dict(vocab_size=99, max_position_embeddings=20, **LAYERS)
IMAGE = dict(image_size=24, patch_size=8, **LAYERS)
SPEECH = dict(
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2,
    **LAYERS,
)

CONFIGS = {
    "bert": (transformers.BertModel, transformers.BertConfig, TEXT),
    "roberta": (transformers.RobertaModel, transformers.RobertaConfig, TEXT),
    "electra": (transformers.ElectraModel, transformers.ElectraConfig, TEXT | {"embedding_size": 24}),
    "vit": (transformers.ViTModel, transformers.ViTConfig, IMAGE),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig, IMAGE | {"num_attention_heads": 2}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, IMAGE | {"mlp_ratio": 2}),
    "clip_text": (
        transformers.CLIPTextModel,
        transformers.CLIPTextConfig,
        TEXT | {"bos_token_id": 0, "pad_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT},
    ),
    "clip_vision": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, IMAGE),
    "siglip_vision": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, IMAGE),
    "ast": (transformers.ASTModel, transformers.ASTConfig, LAYERS | {"max_length": 56, "num_mel_bins": 24}),
    "wav2vec2": (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config, SPEECH),
    "wav2vec2_stable": (
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config,
        SPEECH | {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    ),
    "hubert": (transformers.HubertModel, transformers.HubertConfig, SPEECH),
    "whisper": (
        WhisperEncoder,
        transformers.WhisperConfig,
        {
            "d_model": WIDTH,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 56,
            "num_mel_bins": 12,
            "max_source_positions": 9,
        },
    ),
}
FAMILIES = list(CONFIGS)
TEXT_FAMILIES = ["bert", "roberta", "electra", "clip_text"]
SPEECH_FAMILIES = ["wav2vec2", "wav2vec2_stable", "hubert"]
PADDED_FAMILIES = TEXT_FAMILIES + SPEECH_FAMILIES

# The common names, where a family spells them in its own way.
SPELLING = {
    "whisper": {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    }
}


def build(name: str, seed: int = 0, **config_overrides) -> nn.Module:
    """A random Hugging Face encoder in eval mode; `hidden_size=48`, `num_hidden_layers=3` and so on work for all."""
    model_class, config_class, settings = CONFIGS[name]
    spelling = SPELLING.get(name, {})
    overrides = {spelling.get(key, key): value for key, value in config_overrides.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**settings | overrides))
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            is_scale = name.endswith(("weight", "lambda1"))
            parameter.normal_(mean=1.0 if is_scale else 0.0, std=0.2)


def inputs(name: str, batch: int, seed: int = 0, padded: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    """Keyword arguments of the model's forward. `padded`: right padding where the family knows padding."""
    generator = torch.Generator().manual_seed(seed)
    if name in TEXT_FAMILIES:
        return _text_inputs(name, batch, padded, generator)
    if name in SPEECH_FAMILIES:
        return _speech_inputs(batch, padded, generator, dtype)
    key, shape = {
        "ast": ("input_values", (56, 24)),
        "whisper": ("input_features", (12, 18)),
    }.get(name, ("pixel_values", (3, 24, 24)))
    return {key: torch.randn(batch, *shape, generator=generator).to(dtype)}


def _lengths(batch: int, longest: int, shortest: int, generator: torch.Generator) -> Tensor:
    """[batch] random lengths, the first one the longest."""
    lengths = torch.randint(shortest, longest, (batch,), generator=generator)
    lengths[:1] = longest
    return lengths


def _text_inputs(name: str, batch: int, padded: bool, generator: torch.Generator) -> dict:
    pad = {"roberta": 1, "clip_text": END_OF_TEXT}.get(name, 0)
    ids = torch.randint(3, END_OF_TEXT, (batch, TEXT_LENGTH), generator=generator)
    lengths = _lengths(batch, TEXT_LENGTH, 2, generator) if padded else torch.full((batch,), TEXT_LENGTH)
    positions = torch.arange(TEXT_LENGTH)
    ids[positions == lengths[:, None] - 1] = END_OF_TEXT
    real = positions < lengths[:, None]
    return {"input_ids": ids.masked_fill(~real, pad), "attention_mask": real.long()}


def _speech_inputs(batch: int, padded: bool, generator: torch.Generator, dtype: torch.dtype) -> dict:
    values = torch.randn(batch, SAMPLES, generator=generator).to(dtype)
    if not padded:
        return {"input_values": values}
    real = torch.arange(SAMPLES) < _lengths(batch, SAMPLES, 60, generator)[:, None]
    return {"input_values": values * real, "attention_mask": real.long()}


def hidden_states(model: nn.Module, name: str, **inputs) -> Tensor:
    """[B, S, D] by Hugging Face's own forward."""
    return model(**inputs).last_hidden_state


def token_mask(model: nn.Module, name: str, **inputs) -> Tensor | None:
    """[B, S] bool, True = a real row of the hidden states; None: every row is real."""
    mask = inputs.get("attention_mask")
    if mask is None or name not in SPEECH_FAMILIES:
        return None if mask is None else mask.bool()
    length = int(model._get_feat_extract_output_lengths(mask.shape[1]))
    return model._get_feature_vector_attention_mask(length, mask)


def build_many(names: dict[str, str], seed: int = 0, widths: dict[str, int] | None = None, **overrides) -> dict:
    """{modality: encoder} of {modality: family}; `widths` makes some modalities wider or narrower than the others."""
    widths = widths or {}
    return {
        modality: build(name, seed + index, **{"hidden_size": widths.get(modality, WIDTH)} | overrides)
        for index, (modality, name) in enumerate(names.items())
    }


def inputs_many(
    names: dict[str, str], batch: int, seed: int = 0, padded: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, dict]:
    """{modality: keyword arguments} for the encoders of `build_many`."""
    return {m: inputs(name, batch, seed + index, padded, dtype) for index, (m, name) in enumerate(names.items())}
