"""The embedding stages of the supported families: Hugging Face's inputs -> tokens `[B, S, D]` and their padding."""

from __future__ import annotations

import inspect

import torch
from torch.nn.functional import gelu, pad

from .base import EmbedResult, Encoder


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
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [samples, tokens], 1 where a token is real, not {list(attention_mask.shape)}"
        )
    return attention_mask.bool()


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
    real = text_padding(encoder, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
    eos = encoder.config.eos_token_id
    # Configs from before transformers 4.31 say 2 and mean the highest id. Rows after the end of text are padding; so
    # are those before the text that hold the same id, which CLIP pads with.
    end = real & (input_ids == (input_ids.amax(dim=1, keepdim=True) if eos == 2 else eos))
    after_end = end.int().cumsum(dim=1) - end.int() > 0
    return real & ~after_end


def embed_image(encoder: Encoder, pixel_values: torch.Tensor, **options: bool) -> EmbedResult:
    embeddings = encoder.stem["embeddings"]
    if options and "interpolate_pos_encoding" not in inspect.signature(embeddings.forward).parameters:
        options.pop("interpolate_pos_encoding", None)  # DINOv2 and BEiT do so unasked
    tokens = embeddings(pixel_values, **options)
    if isinstance(tokens, tuple):  # Data2Vec says how many patches there are besides
        tokens = tokens[0]
    if "pre_norm" in encoder.stem:
        tokens = encoder.stem["pre_norm"](tokens)
    return tokens, None


def embed_spectrogram(encoder: Encoder, input_values: torch.Tensor) -> EmbedResult:
    config, (frames, bands) = encoder.config, input_values.shape[1:]
    side, strides = config.patch_size, (config.time_stride, config.frequency_stride)
    given, wanted = (
        [(size - side) // stride for size, stride in zip(sizes, strides, strict=True)]
        for sizes in ((frames, bands), (config.max_length, config.num_mel_bins))
    )
    if given != wanted:  # as many patches in another grid would get each other's positions
        raise ValueError(
            f"this AST encoder takes {config.num_mel_bins} mel bands and {config.max_length} frames, not {bands} and "
            f"{frames}: let its own feature extractor make them"
        )
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
    bands, frames = stem["conv1"].in_channels, 2 * positions.shape[0]
    if input_features.shape[1:] != (bands, frames):
        given = " and ".join(map(str, input_features.shape[1:]))
        raise ValueError(
            f"this Whisper encoder takes {bands} mel bands and {frames} frames, not {given}: let its own feature "
            "extractor make them"
        )
    hidden = gelu(stem["conv2"](gelu(stem["conv1"](input_features))))  # [B, D, S]
    return hidden.transpose(1, 2) + positions, None  # Whisper ignores the padding mask of its mel frames


def embed_ids(encoder: Encoder, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> EmbedResult:
    return encoder.stem["embeddings"](input_ids), text_padding(encoder, attention_mask=attention_mask)


def embed_nomic_text(
    encoder: Encoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> EmbedResult:
    tokens = encoder.stem["embeddings"](input_ids, token_type_ids=token_type_ids)
    return tokens, text_padding(encoder, attention_mask=attention_mask)


def embed_protein(encoder: Encoder, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> EmbedResult:
    tokens = encoder.stem["embeddings"](input_ids, attention_mask=attention_mask)  # its scale counts real tokens
    return tokens, text_padding(encoder, attention_mask=attention_mask)


def embed_siglip_text(
    encoder: Encoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> EmbedResult:
    tokens = encoder.stem["embeddings"](input_ids, position_ids=position_ids)
    return tokens, text_padding(encoder, attention_mask=attention_mask)


def embed_flexible_image(
    encoder: Encoder,
    pixel_values: torch.Tensor,
    spatial_shapes: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None = None,
) -> EmbedResult:
    # Where a picture is absent it has no size; Hugging Face takes none of 0.
    tokens = encoder.stem["embeddings"](pixel_values, spatial_shapes.clamp(min=1))
    return tokens, flexible_image_padding(encoder, pixel_attention_mask)


def flexible_image_padding(
    encoder: Encoder, pixel_attention_mask: torch.Tensor | None = None, **others: torch.Tensor
) -> torch.Tensor | None:
    return None if pixel_attention_mask is None else pixel_attention_mask.bool()


def embed_square_image(encoder: Encoder, pixel_values: torch.Tensor) -> EmbedResult:
    height, width = pixel_values.shape[-2:]
    if height != width:
        raise ValueError(
            f"pictures of {height} x {width} pixels are not square, as this encoder's rotary positions need them here: "
            "crop or resize them"
        )
    return encoder.stem["embeddings"](pixel_values), None


def embed_whole_image(
    encoder: Encoder, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> EmbedResult:
    """All patches in their own order: of ViT-MAE's embeddings without the masking."""
    embeddings = encoder.stem["embeddings"]
    height, width = pixel_values.shape[-2:]
    patches, positions = embeddings.patch_embeddings(pixel_values), embeddings.position_embeddings
    if interpolate_pos_encoding:
        positions = embeddings.interpolate_pos_encoding(patches, height, width)
    elif (height, width) != tuple(embeddings.patch_embeddings.image_size):  # what fills no patch would be cut off
        wanted = " x ".join(map(str, embeddings.patch_embeddings.image_size))
        raise ValueError(
            f"pictures of {height} x {width} pixels have {patches.shape[1]} patches, and this encoder has positions "
            f"for {positions.shape[1] - 1}, of {wanted} pixels: resize them, or pass interpolate_pos_encoding=True"
        )
    first = (embeddings.cls_token + positions[:, :1]).expand(patches.shape[0], -1, -1)
    return torch.cat([first, patches + positions[:, 1:]], dim=1), None


def embed_video(encoder: Encoder, pixel_values: torch.Tensor) -> EmbedResult:
    frames, wanted, tubelet = pixel_values.shape[1], encoder.config.num_frames, encoder.config.tubelet_size
    if frames // tubelet != wanted // tubelet:  # a processor that two models share has the last one's number
        raise ValueError(
            f"this VideoMAE encoder takes {wanted} frames, not {frames}: give the model a processor of its own, or set "
            f"processor.num_frames = {wanted}"
        )
    return encoder.stem["embeddings"](pixel_values, None), None
