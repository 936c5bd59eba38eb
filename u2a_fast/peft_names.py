"""What PEFT calls the linears of an encoder: names of modules, of this and of earlier versions of transformers."""

from __future__ import annotations

import re
import warnings

from .encoders import Encoder
from .encoders.base import FUSED
from .encoders.families import FAMILIES

EARLIER_LAYERS = {"layers": "encoder.layer", "model.layer": "layer"}  # ViT's, DINOv3's
UNREAD = "pooler."  # is dropped when an encoder is loaded


class Names:
    """Names of modules and roles of an encoder's linears, both ways; a linear of Hugging Face may hold several roles.

    >>> from transformers import ViTConfig, ViTModel
    >>> from u2a_fast.encoders import from_pretrained_model
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> names = Names(from_pretrained_model(ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))))
    >>> names.module(0, "attention.q_proj"), names.place("vit.encoder.layer.0.attention.attention.query")
    ('layers.0.attention.q_proj', (0, ('q',)))
    """

    def __init__(self, encoder: Encoder):
        self.family, self.num_layers = encoder.family, encoder.num_layers
        origin, parts = encoder.origin, [self.family.held_as]
        self._unread = [UNREAD]
        if origin is not None:
            self._unread += origin.kept
            parts.insert(0, getattr(origin.model_class, "base_model_prefix", ""))
        held = "".join(rf"(?:{re.escape(part)}\.)?" for part in parts if part)
        layers = {self.family.layers, EARLIER_LAYERS.get(self.family.layers, self.family.layers)}
        self._layer = re.compile(rf"{held}(?:{'|'.join(map(re.escape, layers))})\.(?P<layer>\d{{1,5}})\.(?P<path>.+)")
        self._held = re.compile(held)
        self._roles = self._by_any_name() | self.family.linears

    def _by_any_name(self) -> dict[str, tuple[str, ...]]:
        """As `Family.linears`, by all names that some version of transformers gives them."""
        own = {role for roles in self.family.linears.values() for role in roles}
        known = next((family for family in FAMILIES if family.name == self.family.name), self.family)
        plays = {role: FUSED.get(role, (role,)) for role in known.roles}
        return {path: roles for role, roles in plays.items() if own.issuperset(roles) for path in known.paths(role)}

    def module(self, layer: int, path: str) -> str:
        """The full name of the linear at `path` of a layer."""
        return f"{self.family.layers}.{layer}.{path}"

    def place(self, module: str) -> tuple[int, tuple[str, ...]] | None:
        """The layer and the roles of the linear that PEFT calls `module`; None, with a warning, for a pooler's.

        Raises:
            ValueError: the encoder has no such linear in its layers.
        """
        match = self._layer.fullmatch(module)
        roles = self._roles.get(match["path"]) if match else None
        if match and roles and int(match["layer"]) < self.num_layers:
            return int(match["layer"]), roles
        inside = self._held.sub("", module, count=1) + "."
        if any(name.startswith(inside) for name in self._unread):
            warnings.warn(f"the adapter of {module} is left out: hidden states do not depend on it", stacklevel=2)
            return None
        known = ", ".join(f"{self.family.layers}.N.{path}" for path in self.family.linears)
        raise ValueError(
            f"it adapts {module[:200]}, and u2a_fast adapts, in the {self.num_layers} layers of this encoder, {known}"
        )
