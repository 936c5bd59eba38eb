"""The transformer block of every supported encoder: the only place where kernels meet weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from . import kernels
from .activations import FUSED_ACTIVATIONS, LEAN_ACTIVATIONS
from .layout import Layout, dense
from .lora import LoraLinear
from .norms import BlockNorm, RMSNorm, normalise, normalise_heads, operands
from .rotary import Rotation


def _add(x: torch.Tensor, update: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`x + scale * update`, to the last bit as `kernels.transformer_block` does it."""
    return x + update if scale is None else torch.addcmul(x, update, scale)


NO_NORMS = kernels.Norm(), kernels.Norm()
FP16_LIMIT = torch.finfo(torch.float16).max - 1000  # Hugging Face's margin


class Heads(NamedTuple):
    """How rows see each other: query heads, the key heads that they share, and which rows are seen.

    rotary: the type of layers whose angles turn queries and keys; None: they are not turned. window: a token sees
    tokens at this distance or less; learned rows see and are seen without it.

    >>> Heads(query=8, key=2).causal
    False
    """

    query: int
    key: int
    causal: bool = False
    window: int | None = None
    rotary: str | None = None


class Block(GradientCheckpointingLayer):
    """Self-attention and MLP, each with a residual.

    ::

        pre-norm:   x = x + scale1 * o(attend(qkv(norm1(x))))     x = x + scale2 * fc2(act(fc1(norm2(x))))
        post-norm:  x = norm1(x + o(attend(qkv(x))))              x = norm2(x + fc2(act(fc1(x))))

    Gated MLPs have gate and up side by side in fc1, and act(gate) * up in place of act. Queries and keys may be
    normalised head by head and turned by their position before they meet. A norm of the update may stand in place of
    its scale (Gemma).

    Its parts are public because PMF composes them differently: `project` (norm and q, k, v), `attend_project`,
    `complete` (everything after attention). Where nothing stands between them, they run as one op.

    Args:
        qkv: q, k and v side by side, D -> (query + 2 key) Dh. o: query Dh -> D. fc1, fc2: the MLP.
        norm1, norm2: of attention and of the MLP; None: there is none.
        heads: how rows see each other.
        activation: Hugging Face's name of the MLP's.
        pre_norm: whether the norms stand before their sublayer or after its sum.
        scale1, scale2: LayerScale's vectors `[D]`.
        update_norms: norms of the two updates.
        head_norms: of every head of q, and of k.
        clamps_fp16: whether fp16 results stay finite.
    """

    def __init__(
        self,
        qkv: LoraLinear,
        o: LoraLinear,
        fc1: LoraLinear,
        fc2: LoraLinear,
        norm1: BlockNorm | None,
        norm2: BlockNorm | None,
        heads: Heads,
        activation: str,
        pre_norm: bool,
        scale1: torch.Tensor | None = None,
        scale2: torch.Tensor | None = None,
        update_norms: tuple[BlockNorm | None, BlockNorm | None] = (None, None),
        head_norms: tuple[RMSNorm, RMSNorm] | None = None,
        clamps_fp16: bool = False,
    ):
        super().__init__()
        self.qkv, self.o, self.fc1, self.fc2 = qkv, o, fc1, fc2
        each = {"norm1": norm1, "norm2": norm2, "update_norm1": update_norms[0], "update_norm2": update_norms[1]}
        each |= dict(zip(("q_norm", "k_norm"), head_norms or (None, None), strict=True))
        for name, norm in each.items():
            self.register_module(name, norm)
        for name, scale in (("scale1", scale1), ("scale2", scale2)):
            self.register_parameter(name, None if scale is None else nn.Parameter(scale.detach(), requires_grad=False))
        self.heads, self.pre_norm, self.clamps_fp16 = heads, pre_norm, clamps_fp16
        self.gated = fc1.roles == ("gate", "up")
        self.activation = activation
        self.fused_activation = FUSED_ACTIVATIONS.get(activation)
        self.between = f"gated_{self.fused_activation}" if self.gated else self.fused_activation
        self.act = LEAN_ACTIVATIONS.get(activation) or ACT2FN[activation]
        if isinstance(self.act, nn.Module) and [*self.act.parameters()]:
            raise ValueError(f"the activation {activation!r} has parameters of its own, which our block would not load")

    @property
    def causal(self) -> bool:
        return self.heads.causal

    @property
    def query_width(self) -> int:
        """Of a row's queries, in front of its keys and values."""
        return self.o.in_features

    @property
    def norms(self) -> list[BlockNorm]:
        """Those of the rows: not of queries and keys."""
        each = (self._modules[name] for name in ("norm1", "norm2", "update_norm1", "update_norm2"))
        return [norm for norm in each if norm is not None]

    @property
    def linears(self) -> tuple[LoraLinear, LoraLinear, LoraLinear, LoraLinear]:
        return self.qkv, self.o, self.fc1, self.fc2

    def forward(
        self,
        rows: torch.Tensor,
        layout: Layout | None = None,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        readers: torch.Tensor | None = None,
        reads: str | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """All rows of a batch -> the same after this block; with `readers`, their rows `[B, K, D]` besides.

        Args:
            rows: `[B, T, D]`, or `[1, N, D]` laid end to end.
            layout: how they lie; None: `[B, T, D]` without padding.
            suffix: `[Q, D]`, learned rows that the layout has a place for, and `rows` does not have yet.
            present: bool `[B]`; the token rows of absent samples are never read, the first learned row stands in.
            readers: `[B, K, D]` in the order of the layout, or `[1, K, D]` where all samples have the same: read-only
                rows, which see every row above and are seen by none, themselves included. Computed apart, so that the
                other rows are bitwise what they are without.
            reads: `"first"` or `"last"`: of each sample, that token and the learned rows only, `[1, B * (1 + Q), D]`.
                K and V are those of all rows; queries, attention, output projection and MLP only of those.
        """
        layout = layout or dense(*rows.shape[:2])
        if reads is not None:
            return self._read(rows, layout, suffix, present, readers, reads == "last")
        return self._all(rows, layout, suffix, present, readers)

    def _all(
        self,
        rows: torch.Tensor,
        layout: Layout,
        suffix: torch.Tensor | None,
        present: torch.Tensor | None,
        readers: torch.Tensor | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if readers is None and suffix is None and present is None and (fused := self._fused(rows, layout)) is not None:
            return fused
        qkv, residual = self.enter(rows, layout, suffix, present)
        rows = self.complete(residual, *self.attend_project(qkv, None, layout, of_tokens=True))
        return rows if readers is None else (rows, self._readers(readers, qkv[..., self.query_width :], layout))

    def _read(
        self,
        rows: torch.Tensor,
        layout: Layout,
        suffix: torch.Tensor | None,
        present: torch.Tensor | None,
        readers: torch.Tensor | None,
        last: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        places, groups = layout.read(last, rows.device)
        in_sight = self.heads.window is None and (last or not self.causal)  # who looks back asks from the end
        if suffix is not None or present is not None or not in_sight or not self.qkv.is_splittable:
            rows = self._all(rows, layout, suffix, present, readers)
            rows, *others = rows if readers is not None else (rows,)
            rows = rows.reshape(-1, rows.shape[2]).index_select(0, places)[None]
            return (rows, *others) if others else rows
        q, kv, residual = self.split(rows, places, layout)
        rows = self.complete(residual, *self.attend_project(q, kv, layout, groups, of_tokens=True))
        return rows if readers is None else (rows, self._readers(readers, kv, layout))

    def _readers(self, readers: torch.Tensor, kv: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Read-only rows `[B or 1, K, D]` after this block, `[B, K, D]`; kv `[B, T, 2 Dk]`: K and V of all rows."""
        own, residual = self.project_learned(readers, layout, arranged=True)
        q = own[..., : self.query_width].expand(layout.batch, -1, -1)
        attended = self.attend_project(q, kv, layout, layout.with_queries(readers.shape[1]))
        return self.complete(residual, *attended)

    def split(
        self, rows: torch.Tensor, places: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`enter` with q of the rows at `places` alone: q `[1, R, Dq]`, k and v `[B, T, 2 Dk]`, and these rows."""
        norm = operands(self.norm1) if self.pre_norm else kernels.Norm()
        q, kv, residual = self.qkv.split_after_norm(norm, rows, places)
        rotation = self._rotation(layout)
        q = self._turn(q, rotation and rotation.at(places), self.heads.query, 0)
        return q, self._turn(kv, rotation, self.heads.key, self.heads.query), residual

    def enter(
        self,
        rows: torch.Tensor,
        layout: Layout,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k, v of all rows and the rows themselves, where learned rows join them."""
        qkv, residual = self._joined(rows, layout, suffix, present)
        return self._turn(qkv, self._rotation(layout), self.heads.query + self.heads.key, 0), residual

    def project_learned(
        self, rows: torch.Tensor, layout: Layout, first: int = 0, arranged: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k, v of learned rows that stand `first` rows behind all others, and the rows.

        In the order of the batch; `arranged`: in that of the layout.
        `[1 or B, Q, D]` -> `[1 or B, Q, Dq + 2 Dk]`; `[B, ...]` where positions turn them: each sample has its own.
        """
        qkv, rows = self.project(rows)
        rotation = None
        if self.heads.rotary is not None:
            rotation = layout.rotation_behind(self.heads.rotary, rows.shape[1], first, arranged)
            qkv = qkv.expand(layout.batch, -1, -1).contiguous()
        return self._turn(qkv, rotation, self.heads.query + self.heads.key, 0), rows

    def _joined(
        self,
        rows: torch.Tensor,
        layout: Layout,
        suffix: torch.Tensor | None,
        present: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`project` of the rows and the learned ones that join them.

        Tokens that need no gradient are projected apart from the learned rows, which need one: none is made for them.
        """
        if suffix is None:
            return self.project(rows)
        if present is not None:
            return self.project(rows, suffix, present, suffix[0])
        if layout.places is None and (rows.requires_grad or not rows.is_cpu):
            return self.project(rows, suffix)  # in one pass
        qkv, residual = self.project(rows)
        own, learned = self.project(suffix.to(rows.dtype)[None])
        return layout.join(qkv, own), layout.join(residual, learned)

    def _rotation(self, layout: Layout) -> Rotation | None:
        return None if self.heads.rotary is None else layout.rotations[self.heads.rotary]

    def _turn(self, rows: torch.Tensor, rotation: Rotation | None, heads: int, first: int) -> torch.Tensor:
        """rows `[..., C]`; their `heads` heads in front, queries and keys from `first` on, normalised and turned."""
        turn = self._turning(rotation, heads, first)
        if self._head_norms_train:  # kernels have no gradient of them
            each = [self.q_norm] * self.heads.query + [self.k_norm] * self.heads.key
            rows = normalise_heads(rows, each[first : first + heads])
            turn = None if rotation is None else kernels.Turn(heads, *rotation)
        return rows if turn is None else kernels.rotary(rows.flatten(0, -2), *turn).view(rows.shape)

    @property
    def _head_norms_train(self) -> bool:
        norms = self._modules["q_norm"], self._modules["k_norm"]
        return any(norm is not None and norm.weight.requires_grad for norm in norms) and torch.is_grad_enabled()

    def _turning(self, rotation: Rotation | None, heads: int, first: int = 0) -> kernels.Turn | None:
        """What kernels take of these angles and of the norms of `heads` queries and keys from `first` on."""
        q_norm, k_norm = self._modules["q_norm"], self._modules["k_norm"]
        if not isinstance(q_norm, RMSNorm) or not isinstance(k_norm, RMSNorm):
            return None if rotation is None else kernels.Turn(heads, *rotation)
        each = (q_norm.scale, self.heads.query), (k_norm.scale, self.heads.key)
        weight = torch.cat([scale.expand(count, -1) for scale, count in each])  # [query + key heads, Dh]
        return kernels.Turn(heads, *(rotation or (None, None)), weight[first : first + heads], q_norm.eps)

    def _fused(self, rows: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """Both sublayers as one op; None where they have to run in parts."""
        own = vars(self)  # attributes of a module are slow to read
        modules, scales, heads = own["_modules"], own["_parameters"], own["heads"]
        if own["fused_activation"] is None or kernels.get_backend() == "reference":
            return None
        if (own["clamps_fp16"] and rows.dtype == torch.float16) or modules["update_norm1"] is not None:
            return None
        if modules["q_norm"] is not None and self._head_norms_train:
            return None  # kernels have no gradient of them, nor of scales
        if True in [scale is not None and scale.requires_grad for scale in scales.values()]:
            return None
        if not rows.is_cpu and torch.compiler.is_compiling():
            return None  # a graph cannot hold attention that is differentiated by autograd inside a Function
        linears = [modules[name].operands() for name in ("qkv", "o", "fc1", "fc2")]
        if None in linears:
            return None
        qkv, o, fc1, fc2 = linears
        norms = operands(modules["norm1"]), operands(modules["norm2"])
        before, after = (norms, NO_NORMS) if own["pre_norm"] else (NO_NORMS, norms)
        attention = kernels.Half(before[0], qkv, o, scales["scale1"], after[0])
        mlp = kernels.Half(before[1], fc1, fc2, scales["scale2"], after[1])
        groups = layout.groups
        if not isinstance(groups, kernels.Ends):
            groups = tuple(chain.from_iterable(groups))
        see = kernels.Attention(heads.query, groups, layout.lengths, layout.suffix, heads.causal, heads.key)
        if heads.window is not None:
            see = see._replace(window=heads.window, positions=layout.uneven_positions(rows.device))
        turn = self._turning(self._rotation(layout), heads.query + heads.key)
        return kernels.transformer_block(rows, attention, mlp, see, own["between"], turn)

    def project(
        self,
        tokens: torch.Tensor,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens `[B, S, D]` -> q, k, v of the assembled rows side by side, as the product gives them, and the rows.

        `[B, T, Dq + 2 Dk]` and `[B, T, D]`.
        """
        norm = operands(self.norm1) if self.pre_norm else kernels.Norm()
        return self.qkv.after_norm(norm, tokens, suffix=suffix, present=present, mask_token=mask_token)

    def attend_project(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layout: Layout,
        groups: Sequence[kernels.Group] | kernels.Ends | None = None,
        of_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each sample, and the low-rank product of its result that `o` needs: what `complete` takes.

        Args:
            q: rows `[..., Dq]` beside kv `[..., 2 Dk]`; or q, k and v side by side, and kv None.
            groups: how the rows of q and kv are divided among samples; None: as in the layout.
            of_tokens: whether tokens ask, who may see only what is before them or near. Fewer rows of q than of kv are
                the last of their samples then.

        Returns:
            attended `[Nq, Dq]` and s `[Nq, r]`, None without an adapter on `o`.
        """
        window = self.heads.window if of_tokens else None
        kv = None if kv is None else kv.reshape(-1, kv.shape[-1])
        return kernels.attention_rows(
            q.reshape(-1, q.shape[-1]),
            kv,
            self.heads.query,
            groups or layout.groups,
            self.o.lora_before_dropout,
            lengths=layout.lengths,
            suffix=layout.suffix,
            causal=of_tokens and self.causal,
            kv_heads=self.heads.key,
            window=window,
            positions=layout.uneven_positions(q.device) if window is not None else None,
        )

    def complete(self, residual: torch.Tensor, attended: torch.Tensor, s: torch.Tensor | None = None) -> torch.Tensor:
        """residual `[B or 1, T, D]` and attention's result `[B * T, Dq]` -> the block's output `[B, T, D]`.

        `s` `[B * T, r]` is the low-rank product of `attended`, where it was computed together with it.
        """
        rows = residual.shape[1]
        batch = attended.shape[0] // rows if rows else residual.shape[0]
        update = self.o.forward_projected(attended, s).view(batch, *residual.shape[1:])
        if not self.pre_norm:
            x = normalise(self.norm1, residual + update)
            update, x = self._mlp(x, None)
            return normalise(self.norm2, x + update)
        x = _add(residual, normalise(self.update_norm1, update), self.scale1)
        update, x = self._mlp(x, self.norm2)
        x = _add(x, normalise(self.update_norm2, update), self.scale2)
        return x.clamp(-FP16_LIMIT, FP16_LIMIT) if self.clamps_fp16 and x.dtype == torch.float16 else x

    def _mlp(self, x: torch.Tensor, norm: BlockNorm | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`fc2(act(fc1(norm(x))))`, and x for the residual."""
        hidden, x = self.fc1.after_norm(operands(norm), x)
        if not self.gated:
            return self.fc2(self.act(hidden)), x
        if self.fused_activation is not None:
            return self.fc2(kernels.gated(hidden, self.fused_activation)), x
        gate, up = hidden.chunk(2, dim=-1)
        return self.fc2(self.act(gate) * up), x
