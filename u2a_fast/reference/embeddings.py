"""The embedding stages of Hugging Face's encoders: their inputs -> rows, before the first layer."""

from torch import Tensor, cat, nn, ones_like
from torch.nn.functional import gelu

Embedded = tuple[Tensor, Tensor | None]  # tokens [B, S, D]; True = a real row [B, S], None = all are real


def embed_text(model: nn.Module, attention_mask: Tensor | None = None, **inputs: Tensor) -> Embedded:
    tokens = model.embeddings(**inputs)
    if hasattr(model, "embeddings_project"):  # ELECTRA, where the embedding is narrower than the layers
        tokens = model.embeddings_project(tokens)
    return tokens, None if attention_mask is None else attention_mask.bool()


def embed_protein(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Embedded:
    """ESM-2 scales its tokens by how many of the real ones are masks."""
    tokens = model.embeddings(input_ids, attention_mask=attention_mask)
    return tokens, None if attention_mask is None else attention_mask.bool()


def embed_tokens(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Embedded:
    """Where positions come in with attention."""
    return model.embed_tokens(input_ids), None if attention_mask is None else attention_mask.bool()


def embed_clip_text(model: nn.Module, attention_mask: Tensor | None = None, **inputs: Tensor) -> Embedded:
    """Rows after the first real end-of-text token are padding, whether or not the attention mask says so."""
    ids, end_id = inputs["input_ids"], model.config.eos_token_id
    if end_id == 2:  # configs older than transformers 4.31: the end-of-text token is the highest id of its row
        end_id = ids.amax(dim=1, keepdim=True)
    given = ones_like(ids) if attention_mask is None else attention_mask.long()
    is_end = (ids == end_id) * given
    return model.embeddings(**inputs), given.bool() & (is_end.cumsum(dim=1) - is_end == 0)


def embed_patches(model: nn.Module, **inputs: Tensor) -> Embedded:
    tokens = model.embeddings(**inputs)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens  # Data2Vec returns the sizes of the grid besides
    if hasattr(model, "pre_layrnorm"):  # CLIP; the spelling is Hugging Face's
        tokens = model.pre_layrnorm(tokens)
    return tokens, None


def embed_all_patches(model: nn.Module, pixel_values: Tensor) -> Embedded:
    """ViT-MAE drops patches at random while it is pretrained; here none is, and all stay in order."""
    embeddings = model.embeddings
    rows = embeddings.patch_embeddings(pixel_values) + embeddings.position_embeddings[:, 1:]
    first = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    return cat([first.expand(len(rows), -1, -1), rows], dim=1), None


def embed_patch_rows(
    model: nn.Module, pixel_values: Tensor, spatial_shapes: Tensor, pixel_attention_mask: Tensor
) -> Embedded:
    """SigLIP 2: patches of pictures of any shape, one a row [B, S, C patch^2], padded to the longest."""
    return model.embeddings(pixel_values, spatial_shapes), pixel_attention_mask.bool()


def embed_frames(model: nn.Module, pixel_values: Tensor) -> Embedded:
    """VideoMAE: no tube is masked."""
    return model.embeddings(pixel_values, None), None


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
