"""Which weights of the encoders were trained: those are saved, and lie in memory of their own."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


class Trained(nn.Module):
    """Part of `MultimodalModel`. What trained once is saved from then on, though it may be frozen by then.

    Attributes:
        trained: keys of weights of the encoders that train, or did when the model was built, saved, loaded or put into
            training mode.
    """

    encoders: nn.ModuleDict
    trained: frozenset[str] = frozenset()

    def post_init(self) -> None:
        super().post_init()
        self.remember()

    def train(self, mode: bool = True) -> Trained:
        if mode and not self.training:  # Trainer calls it every step
            self.remember()
        return super().train(mode)

    def remember(self, more: Collection[str] = ()) -> None:
        """Add what trains now, and `more`. A frozen matrix may lie in the memory of the model that the caller gave."""
        for modality, encoder in self.encoders.items():
            for name, p in encoder.named_parameters(f"encoders.{modality}"):
                if (p.requires_grad or name in more) and "lora_" not in name and name not in self.trained:
                    p.data = p.data.clone()
                    self.trained |= {name}
                    encoder.was_trained = True

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """Every key of the encoders that is neither an adapter's nor of what was trained."""
        self.remember()
        keys = self.state_dict().keys()
        frozen = {name for name in keys if name.startswith("encoders.") and "lora_" not in name} - self.trained
        return frozen | {name for name in keys if name.startswith("loss.")}

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, keys: set[str]) -> None:
        """transformers' `post_init` assigns an empty set; the property stays in charge."""
