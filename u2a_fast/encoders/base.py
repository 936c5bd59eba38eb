"""A Hugging Face encoder seen as embed -> blocks -> finish."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from ..block import Block
from ..layout import Layout, layout_of
from ..norms import normalise
from ..padding import Padding, padding_of
from ..rotary import Rotation

LENGTHS = 32  # of texts in a captured step

FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # linears that a layer may have as one

EmbedResult = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Family:
    """What differs between families of encoders; ten lines each in families.py.

    A path may be several in a tuple: the first one that a layer has is taken.

    Args:
        name: for messages.
        classes: names of the Hugging Face classes it reads.
        stem: name -> path of the submodules that `embed` and `finish` use; `final_norm` follows the last layer.
        layers: path of the layer list.
        roles: path inside a layer of the linears q, k, v (or qkv, where they are one), o, fc1, fc2; of a gated MLP
            gate and up (or gate_up, where they are one) in place of fc1.
        norms: paths of the norm beside attention and of the one beside the MLP.
        pre_norm: whether they normalise before (ViT) or after (BERT) their sublayer.
        update_norms: paths of the norms of what the two sublayers add, or None.
        head_norms: paths of the norms of each head of q and k, or None.
        norm_offset: what a norm's weights are added to: 1 for Gemma.
        heads: the config attribute that counts attention heads.
        activation: the config attribute that names the MLP's activation, or `config -> name`.
        embed: `(encoder, **inputs) -> tokens [B, S, D], padding_mask [B, S] or None`.
        padding: `(encoder, **inputs) -> padding_mask`, the one that `embed` gives, from the inputs alone; None where
            `embed` gives none. With it, a step can ask for all that it needs to know of a batch at once.
        class_token: `"first"` row, `"last"` real row, or the `"mean"` of the real rows.
        scales: paths inside a layer of the two LayerScale vectors, or None.
        rotary: path of the module that says the angles of rotary positions, or None.
        causal: whether row i sees rows up to i only (CLIP text).
        window: `(config, index of the layer) -> distance or None`: how far a token of that layer sees.
        query_scale: what the softmax's scale is, over 1 / sqrt(Dh), by the config; only beside `head_norms`.
        clamps_fp16: whether layers keep their fp16 results finite (Whisper).
        requires: what the config must say, where one class has layers of two kinds (Wav2Vec2).
        refuses: what it must not say, and what that is called.
        held_as: the name under which a model of several parts holds it (CLIP's towers).
    """

    name: str
    classes: tuple[str, ...]
    stem: dict[str, str]
    layers: str
    roles: Mapping[str, str | tuple[str, ...]]
    norms: tuple[str, str]
    embed: Callable[..., EmbedResult]
    padding: Callable[..., torch.Tensor] | None = None
    pre_norm: bool = True
    update_norms: tuple[str, str] | None = None
    head_norms: tuple[str, str] | None = None
    norm_offset: float = 0.0
    heads: str = "num_attention_heads"
    activation: str | Callable[[Any], str] = "hidden_act"
    class_token: str = "first"
    scales: tuple[str, str] | None = None
    rotary: str | None = None
    causal: bool = False
    window: Callable[[Any, int], int | None] | None = None
    query_scale: Callable[[Any, int], float] | None = None
    clamps_fp16: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    held_as: str = ""

    def paths(self, role: str) -> tuple[str, ...]:
        """Where a layer may keep the linear of a role."""
        paths = self.roles.get(role, ())
        return (paths,) if isinstance(paths, str) else paths

    def path(self, role: str) -> str:
        """Where it does, of the family as `family_of` gives it for a model."""
        return self.paths(role)[0]

    @property
    def linears(self) -> dict[str, tuple[str, ...]]:
        """`{path inside a layer: the roles of a block that this linear plays}`, of such a family."""
        return {self.path(role): FUSED.get(role, (role,)) for role in self.roles}

    @property
    def vectors(self) -> dict[str, str]:
        """`{name in a block: path inside a layer}` of the norms and the scales."""
        names = ("norm1", "norm2", "update_norm1", "update_norm2", "q_norm", "k_norm", "scale1", "scale2")
        pairs = self.norms, self.update_norms, self.head_norms, self.scales
        paths = (path for pair in pairs for path in pair or (None, None))
        return {name: path for name, path in zip(names, paths, strict=True) if path is not None}


@dataclass(frozen=True)
class Origin:
    """What `unload` needs to know of the model that an encoder was read from.

    Args:
        model_class: its class.
        kept: its tensors that the encoder does not use (a pooler), by name.
    """

    model_class: type[nn.Module]
    kept: Mapping[str, torch.Tensor]

    def __deepcopy__(self, memo: dict) -> Origin:
        return self  # nothing writes to it: copies of an encoder have the same one


class Encoder(nn.Module):
    """A frozen encoder: Hugging Face's embedding stage, our blocks, Hugging Face's final norm.

    Made by `from_pretrained_model`. Every parameter is frozen, and dropout in the embedding stage stays off whatever
    `train()` is called. Calling it gives `finish(blocks(embed(**inputs)))` `[B, S, D]`, adapters applied. Models call
    its parts: forward hooks run on its embeddings, blocks and linears, not on itself nor on norms, which are fused.

    Attributes:
        blocks: `nn.ModuleList` of `Block`.
        width: D. num_layers: number of blocks. config: the Hugging Face config. name_or_path: where it came from.
        loaded_in_8bit: whether bitsandbytes had quantised it before.
        quantized_from: the dtype that its linears had before we quantised them; None: we did not.
        was_trained: whether some of its weights are no longer those that were read.
        origin: what it was read from; None where it was put together by hand.
    """

    def __init__(
        self,
        family: Family,
        config: Any,
        stem: nn.ModuleDict,
        blocks: list[Block],
        rotary: nn.ModuleDict,
        name_or_path: str = "",
        origin: Origin | None = None,
    ):
        super().__init__()
        self.origin = origin
        self.family, self.config, self.name_or_path = family, config, name_or_path
        self.stem, self.rotary = stem, rotary
        self.blocks = nn.ModuleList(blocks)
        self.loaded_in_8bit = blocks[0].o.storage == "int8"
        self.quantized_from: torch.dtype | None = None
        self.was_trained = False
        _, *taken = inspect.signature(family.embed).parameters.values()
        self._takes = tuple(p.name for p in taken if p.kind is not p.VAR_KEYWORD)
        self._needs = {p.name for p in taken if p.name in self._takes and p.default is p.empty}
        self._knows = {*self._takes, "token_type_ids"} if len(self._takes) == len(taken) else None  # None: any name
        self.knows_types = "token_type_ids" in self._takes or self._knows is None
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.blocks[0].o.out_features

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: that of its norms, which are never quantised."""
        return self.blocks[0].norms[0].weight.dtype

    @property
    def reads_all(self) -> bool:
        """Whether the class token is the mean of all rows."""
        return self.family.class_token == "mean"

    @property
    def reads_last(self) -> bool:
        """Whether it is the last row, not the first."""
        return self.family.class_token == "last"

    @property
    def packs_by_plan(self) -> bool:
        """Whether its rows may lie as a plan says: attention sees whole samples, and the class token is their first."""
        sees_all = all(block.heads.window is None and not block.causal for block in self.blocks)
        return self.family.padding is not None and self.family.class_token == "first" and sees_all

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        self.stem.eval()  # frozen is not eval: dropout of the embedding stage must stay off
        self.rotary.eval()  # and so must what DINOv3 does to its positions
        return self

    def embed(self, **inputs: torch.Tensor) -> EmbedResult:
        """Hugging Face's inputs -> tokens `[B, S, D]`, padding_mask bool `[B, S]` (True = a real token) or None.

        Raises:
            ValueError: they are those of another kind of encoder, or a mask of other samples or tokens.
        """
        self._check_names(inputs)
        inputs = {
            name: value.to(self.dtype) if torch.is_tensor(value) and _is_measured(name, value) else value
            for name, value in inputs.items()
            if name != "token_type_ids" or self.knows_types  # BERT's tokenizer says them to DistilBERT as well
        }
        tokens, mask = self.family.embed(self, **inputs)
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(f"a mask of {list(mask.shape)} is not one of {list(tokens.shape[:2])} (samples, tokens)")
        return tokens, mask

    def padding_mask(self, **inputs: torch.Tensor) -> torch.Tensor | None:
        """The mask that `embed` will give, bool `[B, S]`; None where there is none, or none is known before."""
        self._check_names(inputs)
        return None if self.family.padding is None else self.family.padding(self, **inputs)

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        """Refuse what another family's processor makes, which Python would call an unexpected argument of a helper."""
        if (self._knows is not None and inputs.keys() - self._knows) or self._needs.difference(inputs):
            raise ValueError(
                f"an encoder of {self.family.name} takes {', '.join(self._takes)}, not {', '.join(inputs)}: give it "
                "what the processor of its own model makes"
            )

    def lengthened(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Text inputs filled up with padding to a multiple of `LENGTHS` tokens, so that few lengths occur; others as
        they are, and texts that would outgrow the positions."""
        mask = inputs.get("attention_mask")
        if mask is None or "input_ids" not in inputs:
            return dict(inputs)
        length = mask.shape[1]
        more = -length % LENGTHS
        if length + more > self.config.max_position_embeddings - LENGTHS:  # RoBERTa's first positions are not its own
            return dict(inputs)
        filler = {"input_ids": self.config.pad_token_id or 0}
        return {
            name: pad(value, (0, more), value=filler.get(name, 0))
            if torch.is_tensor(value) and value.shape == mask.shape
            else value
            for name, value in inputs.items()
        }

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        tokens, padding_mask = self.embed(**inputs)
        return self.finish(self.run(tokens, padding_of(padding_mask)))

    def run(
        self,
        tokens: torch.Tensor,
        padding: Padding | torch.Tensor | None = None,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        layers: slice = slice(None),
    ) -> torch.Tensor:
        """All blocks (or `layers` of them): tokens `[B, S, D]` -> `[B, S + Q, D]`, before `finish`.

        Padding is not computed: its rows are zeros, or undefined under static shapes.

        Args:
            padding: of the tokens; or the mask that `embed` gave, which is worked out here then.
            suffix: `[Q, D]` learned rows, appended once and always visible.
            present: bool `[B]`; token rows of absent samples are never read, the first suffix row stands in.
        """
        if torch.is_tensor(padding):
            padding = padding_of(padding)
        layout = self.layout_of(tokens, padding, 0 if suffix is None else len(suffix))
        rows = self._through(self.blocks[layers], layout.pack(tokens), layout, suffix, present)
        return layout.unpack(rows, tokens.shape[:2])

    def read(
        self,
        tokens: torch.Tensor,
        padding: Padding | None = None,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[B, S, D]` -> the class token `[B, D]` and the learned rows `[B, Q, D]`, after `finish`.

        As `run`, `finish` and `class_token`, but that the last block computes only the rows that are read.
        """
        if self.reads_all:
            hidden, length = self.finish(self.run(tokens, padding, suffix, present)), tokens.shape[1]
            return self.class_token(hidden[:, :length], padding and padding.mask), hidden[:, length:]
        layout = self.layout_of(tokens, padding, 0 if suffix is None else len(suffix))
        return self.read_laid_out(tokens, layout, suffix, present)

    def read_laid_out(
        self,
        tokens: torch.Tensor,
        layout: Layout,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`read` of tokens whose layout is known, of encoders whose class token is one row."""
        *below, last = self.blocks
        rows, learned = layout.pack(tokens), suffix
        if below:
            rows, learned, present = self._through(below, rows, layout, suffix, present), None, None
        read = last(rows, layout, learned, present, reads=self.family.class_token)
        read = layout.of_each(self.finish(read), 1 + layout.suffix)
        return read[:, 0], read[:, 1:]

    def layout_of(self, tokens: torch.Tensor, padding: Padding | None, suffix: int = 0, behind: int = 0) -> Layout:
        """How tokens `[B, S, D]` and `suffix` learned rows lie, with angles; `behind`: rows that follow at most."""
        layout = layout_of(tokens, padding, suffix)
        return layout.turned(self.angles(tokens, suffix + behind))

    def angles(self, tokens: torch.Tensor, learned: int) -> dict[str, Rotation]:
        """Rotary angles of all places of a sample, S tokens and `learned` rows, by type of layers."""
        length, like = tokens.shape[1], tokens.new_empty(0, dtype=torch.promote_types(tokens.dtype, torch.float32))
        tables = {kind: rotary(length, length + learned, like) for kind, rotary in self.rotary.items()}
        width = self.blocks[0].query_width // self.blocks[0].heads.query
        for table in tables.values():
            if 2 * table.cos.shape[1] != width:
                raise ValueError(
                    f"rotary positions turn {2 * table.cos.shape[1]} of the {width} features of a head: encoders that "
                    "leave some of them as they are cannot be taken"
                )
        return tables

    @staticmethod
    def _through(blocks, rows, layout, suffix, present):
        """Rows of tokens through blocks, the learned rows joined to them in the first."""
        for block in blocks:
            rows = block(rows, layout, suffix, present)
            suffix = present = None
        return rows

    def finish(self, tokens: torch.Tensor) -> torch.Tensor:
        """The encoder's own last norm, LayerNorm or RMSNorm, or nothing where it has none: `[B, S, D]` -> same."""
        return normalise(self.stem["final_norm"], tokens) if "final_norm" in self.stem else tokens

    def class_token(self, tokens: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """tokens `[B, S, D]` (without learned rows) -> `[B, D]`.

        As the family says: the first real row (CLS of BERT, ViT, DINOv2, AST), the last one (where texts end in CLIP,
        SigLIP, Llama, Qwen, Gemma), or the mean of them (SigLIP's pictures, Wav2Vec2, Whisper; BEiT, its CLS included).
        """
        if self.family.class_token == "mean":
            return masked_mean(tokens, padding_mask)
        if self.family.class_token == "first":
            if padding_mask is None:
                return tokens[:, 0]
            index = padding_mask.int().argmax(dim=1)  # left padding: CLS is the first real row
        else:
            length = tokens.shape[1]
            if padding_mask is None:
                return tokens[:, length - 1]
            index = length - 1 - padding_mask.flip(1).int().argmax(dim=1)
        return tokens[torch.arange(tokens.shape[0], device=tokens.device), index]


def _is_measured(name: str, value: torch.Tensor) -> bool:
    """Whether an input has the dtype of the encoder, as pictures have in Hugging Face's that come as integers."""
    return value.is_floating_point() or name == "pixel_values"


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the rows where `mask` `[B, S]` is True: `[B, S, D]` -> `[B, D]`; 0 where no row is.

    Summed in fp32 at least: hundreds of rows leave the range of fp16.
    """
    exact = torch.promote_types(tokens.dtype, torch.float32)
    if mask is None:
        return tokens.mean(dim=1, dtype=exact).to(tokens.dtype)
    total = torch.where(mask[:, :, None], tokens, 0).sum(dim=1, dtype=exact)
    return (total / mask.sum(dim=1, keepdim=True).clamp(min=1)).to(tokens.dtype)
