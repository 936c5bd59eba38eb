"""Activation checkpointing, by Hugging Face's switch."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


class Checkpointing(nn.Module):
    """Part of `MultimodalModel`."""

    supports_gradient_checkpointing = True

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # its name in later versions of transformers
        activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable
        activation_checkpointing_disable = PreTrainedModel.gradient_checkpointing_disable

    @property
    def reentrant(self) -> bool:
        """Whether reentrant checkpoints train everything.

        They see none but the tensors that a block takes by position, and train nothing in a block of which none of
        these asks for a gradient.
        """
        return False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **options: Any
    ) -> None:
        if not self.reentrant and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{type(self).__name__} needs use_reentrant=False: reentrant checkpoints would not train all that it "
                "trains"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)
