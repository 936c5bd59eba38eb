"""The transformer block of every supported encoder: the only place where kernels meet weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from . import kernels
from .layout import Layout, dense
from .lora import LoraLinear


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x)"""
    return F.silu(1.702 * x) / 1.702


def normalise(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` in the dtype of x; of all that it needs for backward, x alone is kept."""
    return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _norm_operands(norm: nn.LayerNorm) -> kernels.Norm:
    return kernels.Norm(norm._parameters["weight"], norm._parameters["bias"], norm.eps)


def _add(x: torch.Tensor, update: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`x + scale * update`, to the last bit as `kernels.transformer_block` does it."""
    return x + update if scale is None else torch.addcmul(x, update, scale)


# Hugging Face's spellings that keep several tensors for backward, as the same function of one kept tensor.
LEAN_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), partial(F.gelu, approximate="tanh")
    ),
    "gelu_python": F.gelu,
}


# Hugging Face's spellings of what `kernels.transformer_block` computes; others run apart from it.
FUSED_ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

NO_NORMS = kernels.Norm(), kernels.Norm()
FP16_LIMIT = torch.finfo(torch.float16).max - 1000  # Hugging Face's margin


class Block(GradientCheckpointingLayer):
    """Self-attention and MLP, each with a residual.

    ::

        pre-norm:   x = x + scale1 * o(attend(qkv(norm1(x))))     x = x + scale2 * fc2(act(fc1(norm2(x))))
        post-norm:  x = norm1(x + o(attend(qkv(x))))              x = norm2(x + fc2(act(fc1(x))))

    Its parts are public because PMF composes them differently: `project` (norm and q, k, v), `attend_project`,
    `complete` (everything after attention). Where nothing stands between them, they run as one op.
    """

    def __init__(
        self,
        qkv: LoraLinear,
        o: LoraLinear,
        fc1: LoraLinear,
        fc2: LoraLinear,
        norm1: nn.LayerNorm,
        norm2: nn.LayerNorm,
        num_heads: int,
        activation: str,
        pre_norm: bool,
        scale1: torch.Tensor | None = None,
        scale2: torch.Tensor | None = None,
        causal: bool = False,
        clamps_fp16: bool = False,
    ):
        super().__init__()
        self.qkv, self.o, self.fc1, self.fc2 = qkv, o, fc1, fc2
        self.norm1, self.norm2 = norm1, norm2
        for name, scale in (("scale1", scale1), ("scale2", scale2)):
            self.register_parameter(name, None if scale is None else nn.Parameter(scale.detach(), requires_grad=False))
        self.num_heads, self.pre_norm, self.causal, self.clamps_fp16 = num_heads, pre_norm, causal, clamps_fp16
        self.activation = activation
        self.fused_activation = FUSED_ACTIVATIONS.get(activation)
        self.act = LEAN_ACTIVATIONS.get(activation) or ACT2FN[activation]
        if isinstance(self.act, nn.Module) and [*self.act.parameters()]:
            raise ValueError(f"the activation {activation!r} has parameters of its own, which our block would not load")

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
        rows = self.complete(residual, *self.attend_project(qkv, None, layout, causal=self.causal))
        return rows if readers is None else (rows, self._readers(readers, qkv[..., readers.shape[2] :], layout))

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
        if suffix is not None or present is not None or self.causal or not self.qkv.is_splittable:
            rows = self._all(rows, layout, suffix, present, readers)
            rows, *others = rows if readers is not None else (rows,)
            rows = rows.reshape(-1, rows.shape[2]).index_select(0, places)[None]
            return (rows, *others) if others else rows
        q, kv, residual = self.split(rows, places)
        rows = self.complete(residual, *self.attend_project(q, kv, layout, groups))
        return rows if readers is None else (rows, self._readers(readers, kv, layout))

    def _readers(self, readers: torch.Tensor, kv: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Read-only rows `[B or 1, K, D]` after this block, `[B, K, D]`; kv `[B, T, 2 D]`: K and V of all rows."""
        own, residual = self.project(readers)
        q = own[..., : readers.shape[2]].expand(layout.batch, -1, -1)
        attended = self.attend_project(q, kv, layout, layout.with_queries(readers.shape[1]))
        return self.complete(residual, *attended)

    def split(self, rows: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`project` with q of the rows at `places` alone: q `[1, R, D]`, k and v `[B, T, 2 D]`, and these rows."""
        norm = _norm_operands(self.norm1) if self.pre_norm else kernels.Norm()
        return self.qkv.split_after_norm(norm, rows, places)

    def enter(
        self,
        rows: torch.Tensor,
        layout: Layout,
        suffix: torch.Tensor | None,
        present: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k, v of all rows and the rows themselves, where learned rows join them.

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
        return layout.join(qkv, own[0]), layout.join(residual, learned[0])

    def _fused(self, rows: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """Both sublayers as one op; None where they have to run in parts."""
        if self.fused_activation is None or kernels.get_backend() == "reference":
            return None
        if self.clamps_fp16 and rows.dtype == torch.float16:
            return None
        if not rows.is_cpu and torch.compiler.is_compiling():
            return None  # a graph cannot hold attention that is differentiated by autograd inside a Function
        modules, own = self._modules, self._parameters  # attributes of a module are slow to read
        linears = [modules[name].operands() for name in ("qkv", "o", "fc1", "fc2")]
        if None in linears:
            return None
        qkv, o, fc1, fc2 = linears
        norms = _norm_operands(modules["norm1"]), _norm_operands(modules["norm2"])
        before, after = (norms, NO_NORMS) if self.pre_norm else (NO_NORMS, norms)
        attention = kernels.Half(before[0], qkv, o, own["scale1"], after[0])
        mlp = kernels.Half(before[1], fc1, fc2, own["scale2"], after[1])
        groups = layout.groups
        if not isinstance(groups, kernels.Ends):
            groups = tuple(size for group in groups for size in group)
        see = kernels.Attention(self.num_heads, groups, layout.lengths, layout.suffix, self.causal)
        return kernels.transformer_block(rows, attention, mlp, see, self.fused_activation)

    def project(
        self,
        tokens: torch.Tensor,
        suffix: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        mask_token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens `[B, S, D]` -> q, k, v of the assembled rows side by side `[B, T, 3 D]`, and the rows `[B, T, D]`."""
        norm = self.norm1 if self.pre_norm else None
        return self.qkv.after_norm(norm, tokens, suffix=suffix, present=present, mask_token=mask_token)

    def attend_project(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | None,
        layout: Layout,
        groups: Sequence[kernels.Group] | kernels.Ends | None = None,
        causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each sample, and the low-rank product of its result that `o` needs: what `complete` takes.

        Args:
            q: rows `[..., D]` beside kv `[..., 2 D]`; or `[..., 3 D]`, q, k and v side by side, and kv None.
            groups: how the rows of q and kv are divided among samples; None: as in the layout.
            causal: row i sees rows up to i only.

        Returns:
            attended `[Nq, D]` and s `[Nq, r]`, None without an adapter on `o`.
        """
        kv = None if kv is None else kv.reshape(-1, kv.shape[-1])
        seen = {"lengths": layout.lengths, "suffix": layout.suffix, "causal": causal}
        rows, groups = q.reshape(-1, q.shape[-1]), groups or layout.groups
        return kernels.attention_rows(rows, kv, self.num_heads, groups, self.o.lora_before_dropout, **seen)

    def complete(self, residual: torch.Tensor, attended: torch.Tensor, s: torch.Tensor | None = None) -> torch.Tensor:
        """residual `[B or 1, T, D]` and attention's result `[B * T, D]` -> the block's output `[B, T, D]`.

        `s` `[B * T, r]` is the low-rank product of `attended`, where it was computed together with it.
        """
        rows = residual.shape[1]
        batch = attended.shape[0] // rows if rows else residual.shape[0]
        attended = self.o.forward_projected(attended, s).view(batch, *residual.shape[1:])
        if not self.pre_norm:
            x = normalise(self.norm1, residual + attended)
            update, x = self._mlp(x, None)
            return normalise(self.norm2, x + update)
        x = _add(residual, attended, self.scale1)
        update, x = self._mlp(x, self.norm2)
        x = _add(x, update, self.scale2)
        return x.clamp(-FP16_LIMIT, FP16_LIMIT) if self.clamps_fp16 and x.dtype == torch.float16 else x

    def _mlp(self, x: torch.Tensor, norm: nn.LayerNorm | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`fc2(act(fc1(norm(x))))`, and x for the residual."""
        hidden, x = self.fc1.after_norm(norm, x)
        return self.fc2(self.act(hidden)), x
