"""Features of a frozen prefix, computed once and kept on disk.

Where nothing below layer l trains, the rows that enter it are the same in every epoch. A sample's key is the sha256 of
its processed inputs, of the prefix's weights, and of what else the result depends on (layer, dtypes). One file per
sample: concurrent writers write the same bytes, and a file that is damaged is a miss and gets written again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .encoders import Encoder
from .tensor_files import TensorFiles, digest

FORMAT = "1"  # part of every key: raise it when what is stored changes
NAMES = ("_name_or_path", "architectures", "dtype", "transformers_version")  # parts of a config that compute nothing


class FeatureCache:
    """What enters layer `layer` of frozen encoders, by content, under `folder`.

    Attributes:
        hits, misses: samples that were read, and that had to be computed.
    """

    def __init__(self, folder: str | os.PathLike):
        self._files = TensorFiles(folder)
        self.folder = self._files.folder
        self.hits = self.misses = 0
        self._fingerprints: weakref.WeakKeyDictionary[Encoder, tuple[tuple, str]] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return type(self), (self.folder,)  # a copy, or one in another process, shares the files and counts for itself

    def lookup(self, encoder: Encoder, layer: int, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """`encoder.embed(**inputs)` through its first `layer` blocks, running only the samples that are not there.

        Args:
            encoder: nothing in its embedding stage and its first `layer` blocks may train.
            inputs: the encoder's keyword arguments; in tensors the samples come first, and padding behind an
                `attention_mask` is no content.

        Returns:
            tokens `[B, S, D]` and padding_mask bool `[B, S]` or None, S the longest of the batch. What lies behind a
            sample's last real row is 0.

        Raises:
            ValueError: something in the prefix trains.

        Where nothing is stored, two samples of one batch that are equal are computed once.
        """
        tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        options = {name: value for name, value in inputs.items() if name not in tensors}
        prefix = self._fingerprint(encoder, layer) + repr(sorted(options.items()))
        first = next(iter(tensors.values()))
        # Wav2Vec2's group norm is over a clip and the silence behind it: there the padded length is content.
        mask = None if getattr(encoder.config, "feat_extract_norm", "") == "group" else inputs.get("attention_mask")
        samples = [_content(tensors, mask, i) for i in range(first.shape[0])]
        keys = [digest(prefix, *sample) for sample in samples]
        found = {key: stored for key in dict.fromkeys(keys) if (stored := self._files.read(key)) is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in found}
        self.hits, self.misses = self.hits + len(set(keys) - set(missing)), self.misses + len(missing)
        if missing:
            rows = torch.tensor(sorted(missing.values()), device=first.device)
            computed = _compute(encoder, layer, {name: value[rows] for name, value in tensors.items()} | options)
            for i, stored in zip(rows.tolist(), computed, strict=True):
                found[keys[i]] = stored
                self._files.write(keys[i], stored)
        if not keys:
            return _run(encoder, layer, inputs)
        return _join([found[key] for key in keys], first.device)

    def _fingerprint(self, encoder: Encoder, layer: int) -> str:
        """Hash of everything but the sample that the result depends on; weights are read again once they changed.

        A change through `.data`, or of a model made in inference mode, is one that torch does not count either.
        """
        tensors = dict(_prefix_tensors(encoder, layer))
        trained = next((name for name, tensor in tensors.items() if tensor.requires_grad), None)
        if trained is not None:
            raise ValueError(
                f"{trained} trains, so features that enter layer {layer} cannot be cached: freeze it first"
            )
        device = next(iter(tensors.values())).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        config = {name: value for name, value in encoder.config.to_dict().items() if name not in NAMES}
        linears = [linear for block in encoder.blocks[:layer] for linear in block.linears]
        setting = (
            *(FORMAT, encoder.family.name, layer, str(encoder.dtype), str(autocast), repr(sorted(config.items()))),
            *((linear.quantize_input, linear.adapter_enabled, linear.scaling) for linear in linears),
        )
        versions = (0 if tensor.is_inference() else tensor._version for tensor in tensors.values())
        state = (setting, tuple(zip((tensor.data_ptr() for tensor in tensors.values()), versions, strict=True)))
        known = self._fingerprints.get(encoder)
        if known is None or known[0] != state:
            known = (state, digest(repr(setting), *tensors.items()))
            self._fingerprints[encoder] = known
        return known[1]


def _prefix_tensors(encoder: Encoder, layer: int) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of the embedding stage and the first `layer` blocks."""
    first = tuple(f"blocks.{i}." for i in range(layer))
    named = [*encoder.named_parameters(), *encoder.named_buffers()]
    stem = [(n, t) for n, t in named if n.startswith("stem.") and not n.startswith("stem.final_norm.")]
    return stem + [(n, t) for n, t in named if n.startswith(first)]


def _content(inputs: Mapping[str, Tensor], mask: Tensor | None, i: int) -> list[tuple[str, Tensor]]:
    """Sample i of the inputs, less the padding at its end, so that the batch it comes in does not matter."""
    length = None
    if mask is not None:
        real = mask[i].nonzero()
        length = int(real[-1]) + 1 if len(real) else 0
    cut = {
        name: value[i, :length] if mask is not None and value.shape[:2] == mask.shape[:2] else value[i]
        for name, value in inputs.items()
    }
    return sorted(cut.items())


@torch.no_grad()
def _run(encoder: Encoder, layer: int, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    tokens, padding_mask = encoder.embed(**inputs)
    return encoder.run(tokens, padding_mask, layers=slice(0, layer)), padding_mask


def _compute(encoder: Encoder, layer: int, inputs: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """For every sample its tokens `[S, D]` up to the last real one, and their mask `[S]` where there is one."""
    tokens, mask = _run(encoder, layer, inputs)
    tokens = tokens.cpu()
    if mask is None:
        return [{"tokens": sample} for sample in tokens]
    mask = mask.cpu()
    lengths = [int(real.nonzero()[-1]) + 1 if real.any() else 0 for real in mask]
    return [{"tokens": t[:n], "mask": m[:n]} for t, m, n in zip(tokens, mask, lengths, strict=True)]


def _join(samples: list[dict[str, Tensor]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    longest = max(sample["tokens"].shape[0] for sample in samples)
    first = samples[0]["tokens"]
    tokens = first.new_zeros(len(samples), longest, first.shape[1])
    mask = torch.zeros(len(samples), longest, dtype=torch.bool)
    for i, sample in enumerate(samples):
        length = sample["tokens"].shape[0]
        tokens[i, :length] = sample["tokens"]
        mask[i, :length] = sample.get("mask", torch.tensor(True))
    return tokens.to(device), mask.to(device) if "mask" in samples[0] else None
