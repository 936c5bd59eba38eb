"""A transformer block with LoRA, differentiated as one: a call of autograd costs as much as a small op.

    z = norm'(x + scale * o(attend(qkv(norm(x)))))              attention_half.py
    y = norm'(z + scale * fc2(act(fc1(norm(z)))))               mlp_half.py                 x, y [B, T, D]

norm stands before each sublayer (pre-norm) or norm' after its sum (post-norm). What is kept for backward is what
norm_linear, attention_rows and linear_lowrank would keep one by one; nothing is kept for the frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from operator import mul

import torch
from torch import Tensor

from . import attention_half, backend, mlp_half, steps_aten, steps_triton
from .attention_half import KEPT, Attention, Turn
from .attention_rows import runs_on_cpu
from .attention_varlen import Ends
from .mlp_half import BETWEEN
from .operands import Half

TRAINED = 8  # entries of `Half.trained`


class _TransformerBlock(torch.autograd.Function):
    """`leaves` are those of `Half.trained` that `needs` marks: an argument costs time whether or not it is one.

    Parameters are kept with `ctx.operands`, not saved: that would take time, and offloading would move the frozen ones.
    Their versions tell whether somebody changed them.
    """

    @staticmethod
    def forward(ctx, operands, x, *leaves):
        attention, mlp, see, activation, turn, dtype, steps, _ = ctx.operands = operands
        rows = x.reshape(-1, x.shape[2])  # recorded: kept for backward, it has to notice a change of x
        with _unrecorded(x, see):
            z, kept, ctx.graph = attention_half.forward(rows, attention, see, turn, dtype, steps, True)
            y, kept_by_mlp = mlp_half.forward(z, mlp, activation, dtype, steps)
            y = y.view(x.shape)
        ctx.leaves, ctx.versions = leaves, _versions(attention, mlp, leaves)
        ctx.save_for_backward(*kept, *kept_by_mlp)
        return y

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        kept, (attention, mlp, see, activation, turn, _, steps, needs) = ctx.saved_tensors, ctx.operands
        of_attention, of_mlp = (ctx.needs_input_grad[1], *needs[:TRAINED]), needs[TRAINED:]
        if ctx.versions != _versions(attention, mlp, ctx.leaves):
            raise RuntimeError("a parameter was modified in place between forward and backward: run the forward anew")
        below, dx = True in of_attention, None
        kept, kept_by_mlp = kept[:KEPT], kept[KEPT:]
        with _unrecorded(dy, see):
            rows = dy.reshape(-1, dy.shape[2])
            dz, *grads = mlp_half.backward(rows, kept_by_mlp, mlp, activation, (below, *of_mlp), steps)
            if below:
                dx, *others = attention_half.backward(dz, kept, ctx.graph, attention, see, turn, of_attention, steps)
                dx, grads = None if dx is None else dx.view(dy.shape), [*others, *grads]
        return None, dx, *(g for g, need in zip(grads, needs[-len(grads) :], strict=True) if need)


def _unrecorded(x: Tensor, see: Attention) -> contextlib.AbstractContextManager:
    """`backend.unrecorded`, but where attention is differentiated by autograd."""
    return backend.unrecorded() if runs_on_cpu(x, see.groups) else contextlib.nullcontext()


def _versions(attention: Half, mlp: Half, leaves: Sequence[Tensor]) -> list[int]:
    """How often each weight and each leaf was written to; a graph sees to it itself, inference tensors do not count."""
    if torch.compiler.is_compiling():
        return []
    used = attention.first[0], attention.second[0], mlp.first[0], mlp.second[0], *leaves
    try:
        return [t._version for t in used]
    except RuntimeError:  # of one made in inference mode
        return [t._version for t in used if not t.is_inference()]


def _check(x: Tensor, see: Attention, activation: str) -> None:
    if activation not in BETWEEN:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(BETWEEN)}")
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, T, D], not {x.dtype} {list(x.shape)}")
    if isinstance(see.groups, Ends) or torch.compiler.is_compiling():
        return
    flat, rows = see.groups, x.shape[0] * x.shape[1]
    of_q, of_k = sum(map(mul, flat[::3], flat[1::3])), sum(map(mul, flat[::3], flat[2::3]))
    if of_q != rows or of_k != rows:
        raise ValueError(f"groups {flat} (samples, rows, rows, and so on) do not add up to the {rows} rows of x")


def transformer_block(
    x: Tensor, attention: Half, mlp: Half, see: Attention, activation: str, turn: Turn | None = None
) -> Tensor:
    """Self-attention and MLP, each with its norm, projections and residual connection.

    Args:
        x: [B, T, D].
        attention: `first` is q, k, v side by side, D -> (heads + 2 kv_heads) Dh; `second` is heads Dh -> D.
        mlp: `first` is D -> F, of a gated MLP D -> 2 F, gate and up side by side; `second` is F -> D.
        see: heads, how the B * T rows are divided among samples, and which keys they see.
        activation: a name in `activations.ACTIVATIONS`; of a gated MLP with "gated_" before it.
        turn: the positions and norms of queries and keys; None: they meet as they are.

    Returns:
        [B, T, D] in the dtype of x.

    Gradients reach x and `Half.trained`; the weights are frozen.

    Raises:
        ValueError: an x of other dimensions, groups that do not add up to its rows, or an unknown activation.

    >>> from u2a_fast.kernels import Linear, Norm
    >>> eye, none = torch.eye(2), torch.zeros(2, 2)
    >>> attention = Half(Norm(), Linear(torch.cat([none, none, eye])), Linear(eye))
    >>> mlp = Half(Norm(), Linear(eye), Linear(none))
    >>> see = Attention(heads=1, groups=(1, 2, 2), lengths=None, suffix=0, causal=False)
    >>> transformer_block(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), attention, mlp, see, "relu")
    tensor([[[3., 5.],
             [5., 7.]]])
    """
    _check(x, see, activation)
    dtype, trained = backend.compute_dtype(x), (*attention.trained, *mlp.trained)
    others = () if x.is_cpu else (*attention.frozen, *mlp.frozen, *trained)  # ATen refuses what lies elsewhere itself
    steps = steps_triton if backend.resolve(x, *others) == "triton" else steps_aten
    if torch.is_grad_enabled():
        needs = [t is not None and t.requires_grad for t in trained]
        if x.requires_grad or True in needs:
            leaves = [t for t, need in zip(trained, needs, strict=True) if need]
            return _TransformerBlock.apply((attention, mlp, see, activation, turn, dtype, steps, needs), x, *leaves)
    z, *_ = attention_half.forward(x.reshape(-1, x.shape[2]), attention, see, turn, dtype, steps, False)
    return mlp_half.forward(z, mlp, activation, dtype, steps)[0].view(x.shape)
