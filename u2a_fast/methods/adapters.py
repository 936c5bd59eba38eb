"""Adapters of a model in and out: PEFT's folders, off for a while, merged into plain encoders."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..adapters import adapted_linears, describe_adapters, restore_adapters
from ..encoders.frozen import mode_of
from ..encoders.unload import unload
from ..peft_folders import load_folder, write_folder
from .presence import check_modalities


class Adapters(nn.Module):
    """Part of `MultimodalModel`; the names are PEFT's."""

    _steps: Any
    config: Any

    def save_adapters(self, save_directory: str | os.PathLike) -> None:
        """Write a PEFT folder for every modality that has adapters, `save_directory/<modality>`.

        `peft.PeftModel.from_pretrained(encoder, folder)` and, in transformers, `encoder.load_adapter(folder)` read it
        onto the plain Hugging Face encoder. What the model trains besides (mask tokens, prompts, heads, biases) is
        saved by `save_pretrained` alone.

        Raises:
            ValueError: no modality has adapters.
        """
        adapted = {name: encoder for name, encoder in self.encoders.items() if adapted_linears(encoder)}
        if not adapted:
            raise ValueError("this model has no adapters to save: give it some with lora=LoraConfig(...)")
        for name, encoder in adapted.items():
            write_folder(Path(save_directory) / name, encoder)

    def load_adapter(self, name_or_path: str | os.PathLike, modality: str) -> None:
        """Put a PEFT LoRA adapter in place of a modality's own; it trains, and `save_pretrained` saves it.

        Ranks and alphas may differ between linears, which `u2a_fast.adapters.set_low_ranks` brings together exactly.
        Where one linear computes q, k and v (ModernBERT), each gets a copy of its A, and they train apart.
        The parameters are new ones: make optimisers, compile and wrap for DDP or FSDP afterwards, and capture again.

        Args:
            name_or_path: a folder or hub id with `adapter_config.json` and `adapter_model.safetensors`, in itself or in
                a subfolder named after the modality. Names of modules may be those of transformers 4.
            modality: whose encoder it was trained on.

        Raises:
            ValueError: an unknown modality; no such folder; an adapter that does not fit the encoder; anything that is
                not plain LoRA on the linears of its layers (DoRA, trained biases, `modules_to_save`, ...). The model is
                then as it was.
            TypeError: a name that is neither text nor a path.
        """
        check_modalities([modality], self.config.modalities)
        load_folder(name_or_path, self.encoders[modality], modality)
        self.config.adapters = {**self.config.adapters, modality: describe_adapters(self.encoders[modality])}
        if self._steps is not None:
            self._steps.forget()

    def _restore_adapters(self, described: Any) -> None:
        """Adapters of the shapes that a config describes, where `load_adapter` had brought others than the method's."""
        if not isinstance(described, Mapping):
            raise ValueError(f"the config describes adapters as {described!r}, not by modality")
        check_modalities(described, self.config.modalities)
        for modality, of_encoder in described.items():
            if not isinstance(of_encoder, Mapping):
                raise ValueError(f"the config describes the adapters of {modality} as {of_encoder!r}, not by linear")
            restore_adapters(self.encoders[modality], of_encoder)
        self.config.adapters = {**described}

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it, encoders compute as if they had no adapters; what else was trained stays in use."""
        linears = [linear for encoder in self.encoders.values() for linear in adapted_linears(encoder).values()]
        before, steps = [linear.adapter_enabled for linear in linears], self._steps
        self._steps = None  # captured steps compute with adapters
        try:
            for linear in linears:
                linear.adapter_enabled = False
            yield
        finally:
            self._steps = steps
            for linear, enabled in zip(linears, before, strict=True):
                linear.adapter_enabled = enabled

    def merge_and_unload(self) -> dict[str, PreTrainedModel]:
        """`{modality: plain Hugging Face encoder}`, copies with `W + scaling B A` in place of each weight.

        In eval mode and nothing frozen. This model stays as it is; what it trains besides the encoders is not in them.
        It warns where merging rounds: for encoders in half precision, int8 or 4 bits.

        Raises:
            ValueError: an encoder was put together by hand, so that there is no class to go back to.
        """
        for name, encoder in self.encoders.items():
            stored = mode_of(encoder) or str(encoder.dtype).removeprefix("torch.")
            if stored not in ("float32", "float64"):
                warnings.warn(
                    f"the {name} encoder is stored as {stored}: its merged weights are rounded {encoder.dtype} ones, "
                    "so that hidden states differ a little from those with adapters",
                    stacklevel=2,
                )
        return {name: unload(encoder) for name, encoder in self.encoders.items()}
