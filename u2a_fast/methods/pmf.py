"""PMF: encoders that exchange prompts in their last layers (arXiv 2304.06306)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import host, kernels
from ..block import Block
from ..feature_cache import FeatureCache
from ..kernels import Group
from ..layout import Layout
from ..padding import Padding, padding_of
from .base import MultimodalModel, PaddingMasks
from .config import MultimodalConfig, Option, check_count
from .presence import Rows, nobody

Layouts = Callable[[int], Layout]  # the layout of one modality's rows with so many learned rows after each sample's


class PMFConfig(MultimodalConfig):
    model_type = "pmf"


@dataclass(frozen=True)
class PackedTokens:
    """The b samples that have one modality: tokens `[b, S, D]` and their padding.

    positions: int64 `[b]`, their places in the batch, on the CPU. index: the same beside the tokens.
    """

    positions: Tensor
    index: Tensor
    tokens: Tensor
    padding: Padding | None

    def keep(self, here: Tensor) -> PackedTokens:
        """Those of them that are marked in `here`, bool `[B]` on the CPU."""
        kept = here[self.positions].nonzero().flatten()
        if len(kept) == len(self.positions):
            return self
        rows = host.send(kept, self.index.device)
        padding = self.padding and self.padding.select(kept)
        return PackedTokens(self.positions[kept], self.index[rows], self.tokens[rows], padding)


class FusionPart(nn.Module):
    """One modality in one fusion layer: its prompts, and its translators to the others (`{modality: width}`).

    A translator is Linear(d -> h), ReLU, Linear(h -> d') with h = max(d // 2, d' // 2).
    """

    def __init__(self, width: int, targets: dict[str, int], query: int, query_context: int, context: int, train: bool):
        super().__init__()
        self.query_prompt = nn.Parameter(torch.randn(query, width) * 0.02)
        self.query_context_prompt = nn.Parameter(torch.randn(query_context, width) * 0.02)
        self.fusion_context_prompt = nn.Parameter(torch.randn(context, width) * 0.02, requires_grad=train)
        translators = {}
        for target, other in targets.items():
            hidden = max(width // 2, other // 2)
            translators[target] = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, other))
        # Two modalities need no target in the name: translator.0.weight, not translator.image.0.weight.
        self.translator = nn.ModuleDict(translators) if len(targets) > 1 else next(iter(translators.values()))

    def translator_to(self, target: str) -> nn.Module:
        return self.translator[target] if isinstance(self.translator, nn.ModuleDict) else self.translator

    def message(self, target: str, y: Tensor) -> Tensor:
        """What the rows y `[b, n, d]` say to modality `target`: `[b, n, d']`."""
        return self.translator_to(target)(y)

    def query(self, block: Block, kv: Tensor, layout: Layouts) -> Tensor:
        """y = Layer([x ; qcp ; qp])[-n:], `[b, n, D]`. kv: K and V of the rows x."""
        width, count = block.query_width, len(self.query_prompt)
        prompts = torch.cat([self.query_context_prompt, self.query_prompt])
        own, rows = block.project_learned(prompts.to(kv.dtype)[None], layout(0))  # [1 or b, c + n, 3 D]
        q, own = own[:, -count:, :width], own[..., width:]

        def ask(q: Tensor, own: Tensor) -> Tensor:
            where = layout(own.shape[1])
            q = where.arranged(q.expand(where.batch, -1, -1))
            return block.attend_project(q, where.join(kv, own), where, where.with_queries(q.shape[1]))[0]

        if not block.causal:
            attended = ask(q, own)
        else:  # learned rows come after the tokens: query i sees all rows but the queries after it
            seen = own.shape[1] - count + 1
            each = [ask(q[:, i : i + 1], own[:, : seen + i]) for i in range(count)]
            attended = torch.stack(each, dim=1).flatten(0, 1)
        return layout(0).of_each(block.complete(rows[:, -count:], attended), count)

    def fuse(self, block: Block, x: Tensor, q: Tensor, kv: Tensor, messages: Tensor, layout: Layouts) -> Tensor:
        """Layer([x ; fcp ; messages])[: N] of the rows x, whose queries are q. kv: K and V of all rows."""
        width, count = block.query_width, len(self.fusion_context_prompt)
        context, _ = block.project_learned(self.fusion_context_prompt.to(x.dtype)[None], layout(0))  # [1 or b, c', 3 D]
        said, _ = block.project_learned(messages.to(x.dtype), layout(0), first=count)  # [b, n', 3 D]
        context, said = context[..., width:], said[..., width:]
        if len(context) == 1:
            learned = kernels.assemble(said, prefix=context[0])  # [b, c' + n', 2 D]
        else:
            learned = torch.cat([context, said], dim=1)
        where, asking = layout(learned.shape[1]), layout(0).groups
        if q.shape[:2] != kv.shape[:2]:  # one row of each sample
            asking = where.with_queries(1)
        groups = [Group(a.samples, a.queries, b.keys) for a, b in zip(asking, where.groups, strict=True)]
        if block.heads.window is None:
            return block.complete(x, *block.attend_project(q, where.join(kv, learned), where, groups))
        all_q = where.join(q, q.new_zeros(1, learned.shape[1], width))  # who is near whom is told of whole samples
        attended, s = block.attend_project(all_q, where.join(kv, learned), where, of_tokens=True)
        return block.complete(x, *(t if t is None else where.of_tokens(t) for t in (attended, s)))


class FusionLayer(GradientCheckpointingLayer, nn.ModuleDict):
    """`{modality: FusionPart}`: one layer of every encoder, which exchange what their query prompts have read.

    ::

        query stage:    y_s = Layer_s([x_s ; qcp_s ; qp_s])[-n:]         message s->t = translator_{s->t}(y_s)
        fusion stage:   x_t <- Layer_t([x_t ; fcp_t ; messages to t])[: N_t]

    Exactly that, for little more than Layer_t(x_t): K and V of x serve both stages, prompts are projected once for all
    samples, and only rows that are read go through attention, output projection and MLP.
    """

    def __init__(self, widths: dict[str, int], *prompts: Any):
        targets = {m: {t: d for t, d in widths.items() if t != m} for m in widths}
        super().__init__({m: FusionPart(d, targets[m], *prompts) for m, d in widths.items()})

    def forward(
        self,
        blocks: Sequence[Block],
        indices: Sequence[Tensor],
        layouts: Sequence[Layouts],
        places: Sequence[Tensor | None],
        batch: int,
        *tokens: Tensor,
    ) -> tuple[Tensor, ...]:
        """Rows of the samples `indices` `[b_m]` out of `batch`, for every m -> the same; or those at `places` alone."""
        rows = list(zip(self.items(), blocks, indices, layouts, places, tokens, strict=True))
        projected, queries = [], {}
        for (name, part), block, index, layout, place, x in rows:
            if place is None or block.causal or block.heads.window is not None or not block.qkv.is_splittable:
                qkv, x = block.enter(x, layout(0))
                q, kv = qkv[..., : block.query_width], qkv[..., block.query_width :]
            else:
                q, kv, x = block.split(x, place, layout(0))
            y = part.query(block, kv, layout)
            # A missing modality (ours) says what its query prompts say before they have read anything.
            unread = part.query_prompt.expand(batch, -1, -1)  # [B, n, D]
            queries[name] = unread.index_copy(0, index, y.to(unread.dtype))
            projected.append((x, q, kv))
        fused = []
        for ((name, part), block, index, layout, place, _), (x, q, kv) in zip(rows, projected, strict=True):
            messages = [self[source].message(name, y[index]) for source, y in queries.items() if source != name]
            if block.causal:  # its tokens look back only, and learned rows come after them
                own = block.complete(x, *block.attend_project(q, kv, layout(0), of_tokens=True))
            else:
                own = part.fuse(block, x, q, kv, torch.cat(messages, dim=1), layout)
            unread = place is not None and own.shape[:2].numel() != len(place)
            fused.append(own.flatten(0, 1).index_select(0, place)[None] if unread else own)
        return tuple(fused)


class PMF(MultimodalModel):
    """Prompt-based Multimodal Fusion: frozen encoders, fused in their last layers by prompts alone.

    ::

        encoders below the last L_f layers run alone; FusionLayer i pairs layers depth - L_f + i, fresh prompts in each
        logits = mean over the present m of W_m class_token(finish(x_m)) + b_m

    Args:
        encoders: `{modality: Hugging Face encoder, hub id, folder or Encoder}`; depths and widths may differ.
        num_labels: C.
        problem_type: as in Hugging Face's classifiers; None: told from the labels.
        fusion_layers: L_f, ours; the prompt counts are the official code's.
        query_prompts: n, rows that read a modality for the others.
        query_context_prompts, fusion_context_prompts: rows beside them, and beside the messages; 0 or more.
        train_fusion_context: False keeps fcp as drawn, as a wrong name in the official code does.
        quantization: how frozen linears are stored, see `u2a_fast.quantization`; None: as they came.
        all_absent: `"error"`; there is no `"prior"`, since a sample with nothing has no logits to average.
        processors: `{modality: processor}` for raw samples; by default loaded from the encoders' folders.
        label_smoothing: of the cross entropy, while training; see `U2A`.
        feature_cache: a folder that keeps what enters the fusion layers, by content, for later epochs and runs.

    Raises:
        ValueError: more fusion layers than an encoder has, no query prompts, or `all_absent="prior"`.

    Source: the paper's section 3 and its official code. Missing modalities, and more than two, are ours. A causal
    encoder (CLIP text) speaks to the others, but its tokens see no learned row, since those come after them.

    >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    >>> text = BertModel(BertConfig(vocab_size=9, **sizes))
    >>> image = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes))
    >>> model = PMF({"image": image, "text": text}, num_labels=3, fusion_layers=1).eval()
    >>> present = torch.tensor([[True, True], [False, True]])
    >>> model(image={"pixel_values": torch.randn(2, 3, 8, 8)}, text={"input_ids": torch.ones(2, 4).long()},
    ...       modality_mask=present).logits.shape
    torch.Size([2, 3])
    """

    config_class = PMFConfig
    all_absent = Option("error".__eq__, '"error", since nothing present gives no logits')

    def __init__(
        self,
        encoders: Mapping[str, str | nn.Module],
        num_labels: int,
        problem_type: str | None = None,
        fusion_layers: int = 2,
        query_prompts: int = 4,
        query_context_prompts: int = 4,
        fusion_context_prompts: int = 4,
        train_fusion_context: bool = True,
        quantization: Any = None,
        all_absent: str = "error",
        processors: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        feature_cache: str | os.PathLike | None = None,
    ):
        counts = {"query_prompts": query_prompts, "query_context_prompts": query_context_prompts}
        counts |= {"fusion_context_prompts": fusion_context_prompts, "fusion_layers": fusion_layers}
        for name, count in counts.items():
            check_count(name, count, 0 if "context" in name else 1)
        super().__init__(
            encoders,
            num_labels,
            problem_type,
            quantization,
            processors,
            all_absent=all_absent,
            label_smoothing=label_smoothing,
            train_fusion_context=train_fusion_context,
            **counts,
        )
        for name, encoder in self.encoders.items():
            if encoder.num_layers < fusion_layers:
                raise ValueError(f"fusion_layers={fusion_layers}, but {name} has {encoder.num_layers} layers")
        self.feature_cache = None if feature_cache is None else FeatureCache(feature_cache)
        widths = {name: encoder.width for name, encoder in self.encoders.items()}
        prompts = query_prompts, query_context_prompts, fusion_context_prompts, train_fusion_context
        self.layers = nn.ModuleList(FusionLayer(widths, *prompts) for _ in range(fusion_layers))
        self.head = nn.ModuleDict({m: nn.Linear(d, num_labels) for m, d in widths.items()})
        self._freeze_unheard()
        self.post_init()

    def _freeze_unheard(self) -> None:
        """What is said to a causal encoder changes none of its tokens: DDP would wait for the gradients for ever."""
        causal = {name for name, encoder in self.encoders.items() if encoder.blocks[-1].causal}
        for name, part in (named for layer in self.layers for named in layer.items()):
            others = self.encoders.keys() - {name}
            for target in others & causal:
                part.translator_to(target).requires_grad_(False)
            if others <= causal:
                part.query_prompt.requires_grad_(False)
                part.query_context_prompt.requires_grad_(False)
            if name in causal:
                part.fusion_context_prompt.requires_grad_(False)

    @classmethod
    def recipe(cls, options: Any) -> dict[str, Any]:
        return {"feature_cache": options.feature_cache}

    def encode(
        self, inputs: Mapping[str, Mapping[str, Any]], present: Tensor, padding: PaddingMasks | None = None
    ) -> list[PackedTokens]:
        """The tokens below the fusion layers, of the rows that are present only."""
        rows, encoded = self.rows(inputs, present, padding), []
        for name, encoder in self.encoders.items():
            own = rows.get(name) or nobody(self.device)
            tokens = self.below(name, own) if own.inputs else own.embed(encoder)  # there is nothing to train below
            encoded.append(PackedTokens(own.positions, own.index, *tokens))
        return encoded

    def below(self, name: str, rows: Rows) -> tuple[Tensor, Padding | None]:
        """Tokens `[b, S, D]` of one modality where the fusion layers begin, and their padding.

        Nothing trains down here, so nothing is kept for backward.
        """
        encoder, below = self.encoders[name], self.encoders[name].num_layers - len(self.layers)
        if self.feature_cache is not None:
            tokens, mask = self.feature_cache.lookup(encoder, below, rows.inputs)
            return tokens, padding_of(mask)
        tokens, padding = rows.embed(encoder)
        return encoder.run(tokens, padding, layers=slice(below)), padding

    def fuse(self, encoded: list[PackedTokens], present: Tensor) -> tuple[Tensor, Tensor]:
        """present `[B, M]` may mark less than was encoded, never more."""
        (on_host,) = host.to_host(present)
        kept = [packed.keep(here) for packed, here in zip(encoded, on_host.unbind(1), strict=True)]
        # functools.cache: a layer asks for the same places as the one before it
        layouts = [
            functools.cache(functools.partial(encoder.layout_of, p.tokens, p.padding, behind=self._most_prompts))
            for encoder, p in zip(self.encoders.values(), kept, strict=True)
        ]
        rows = [layout(0).pack(packed.tokens) for layout, packed in zip(layouts, kept, strict=True)]
        indices, unread = [packed.index for packed in kept], [None] * len(kept)
        if any(hasattr(encoder.blocks[-1].qkv.weight, "placements") for encoder in self.encoders.values()):
            raise ValueError(
                "fusion layers of PMF run parts of blocks, which FSDP2 does not see: shard the model as a whole "
                "(fsdp_auto_wrap_policy: NO_WRAP), or use DDP"
            )
        for i, layer in enumerate(self.layers):
            blocks = [encoder.blocks[i - len(self.layers)] for encoder in self.encoders.values()]
            is_last = i == len(self.layers) - 1
            places = [*map(self._class_places, self.encoders, layouts, rows)] if is_last else unread
            rows = layer(blocks, indices, layouts, places, len(present), *rows)
        logits: Any = 0
        for (name, head), packed, layout, x in zip(self.head.items(), kept, layouts, rows, strict=True):
            class_token = self._class_token(name, packed, layout(0), x)
            own = head(class_token.to(head.weight.dtype))
            logits = logits + own.new_zeros(len(present), own.shape[1]).index_copy(0, packed.index, own)
        logits = logits / host.send(present, logits.device).sum(dim=1, keepdim=True).clamp(min=1)
        return logits, logits.new_zeros(())

    @property
    def _most_prompts(self) -> int:
        """How many learned rows stand behind the tokens of a sample at most."""
        first = next(iter(self.layers[0].values()))
        messages = (len(self.encoders) - 1) * len(first.query_prompt)
        return max(
            len(first.query_context_prompt) + len(first.query_prompt), len(first.fusion_context_prompt) + messages
        )

    def _class_places(self, name: str, layout: Layouts, rows: Tensor) -> Tensor | None:
        """Where the class tokens stand among the rows of modality `name`; None where each is the mean of many."""
        encoder = self.encoders[name]
        return None if encoder.reads_all else layout(0).read(encoder.reads_last, rows.device)[0]

    def _class_token(self, name: str, packed: PackedTokens, layout: Layout, rows: Tensor) -> Tensor:
        """`[b, D]` from what the last fusion layer gave: the class tokens' rows, or all."""
        encoder = self.encoders[name]
        if not encoder.reads_all:
            return layout.of_each(encoder.finish(rows), 1)[:, 0]
        hidden = encoder.finish(layout.unpack(rows, packed.tokens.shape[:2]))
        return encoder.class_token(hidden, packed.padding and packed.padding.mask)

    def export_parameters(self) -> dict[str, Tensor]:
        """All but the encoders: `layers.{i}.{modality}.*` (0: the lowest fusion layer) and `head.{modality}.*`."""
        return {name: p.detach() for name, p in self.named_parameters() if not name.startswith("encoders.")}
