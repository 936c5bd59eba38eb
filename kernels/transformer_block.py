"""A transformer block with LoRA, differentiated as one: a call of autograd costs as much as a small op.

    z = norm'(x + scale * o(attend(qkv(norm(x)))))              attention_half.py
    y = norm'(z + scale * fc2(act(fc1(norm(z)))))               mlp_half.py                 x, y [B, T, D]

norm stands before each sublayer (pre-norm) or norm' after its sum (post-norm). What is kept for backward is what
norm_linear, attention_rows and linear_lowrank would keep one by one; nothing is kept for the frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention_half, backend, mlp_half
from .attention_half import Attention
from .operands import Half

TRAINED, FROZEN, KEPT = 8, 5, 11  # entries of `Half.trained`, of `Half.frozen`, and kept by the attention half


class _TransformerBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attention, mlp, see, activation, dtype, x, *trained):
        z, kept = attention_half.forward(x.reshape(-1, x.shape[2]), attention, see, dtype)
        y, kept_by_mlp = mlp_half.forward(z, mlp, activation, dtype)
        ctx.halves, ctx.options, ctx.dtype = (attention, mlp), (see._replace(lengths=None), activation), x.dtype
        ctx.save_for_backward(*kept, *kept_by_mlp, *trained, *attention.frozen, *mlp.frozen, see.lengths)
        return y.view(x.shape)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        saved, (see, activation), need = ctx.saved_tensors, ctx.options, ctx.needs_input_grad[5:]
        *saved, lengths = saved
        kept, kept_by_mlp = saved[:KEPT], saved[KEPT : -2 * (TRAINED + FROZEN)]
        tensors = saved[-2 * (TRAINED + FROZEN) :]
        trained, frozen = tensors[: 2 * TRAINED], tensors[2 * TRAINED :]
        attention = ctx.halves[0].holding(trained[:TRAINED], frozen[:FROZEN])
        mlp = ctx.halves[1].holding(trained[TRAINED:], frozen[FROZEN:])
        below = any(need[: 1 + TRAINED])
        dz, *of_mlp = mlp_half.backward(
            dy.reshape(-1, dy.shape[2]), kept_by_mlp, mlp, activation, ctx.dtype, (below, *need[1 + TRAINED :])
        )
        dx, of_attention = None, [None] * TRAINED
        if below:
            see = see._replace(lengths=lengths)
            dx, *of_attention = attention_half.backward(dz, kept, attention, see, ctx.dtype, need[: 1 + TRAINED])
        return *[None] * 5, None if dx is None else dx.view(dy.shape), *of_attention, *of_mlp


def transformer_block(x: Tensor, attention: Half, mlp: Half, see: Attention, activation: str) -> Tensor:
    """Self-attention and MLP, each with its norm, projections and residual connection.

    Args:
        x: [B, T, D].
        attention: `first` is q, k, v side by side, D -> 3 D; `second` is D -> D.
        mlp: `first` is D -> F; `second` is F -> D.
        see: heads, how the B * T rows are divided among samples, and which keys they see.
        activation: a name in `mlp_half.ACTIVATIONS`.

    Returns:
        [B, T, D] in the dtype of x.

    Gradients reach x and `Half.trained`; the weights are frozen.

    >>> from u2a_fast.kernels import Linear, Norm
    >>> eye, none = torch.eye(2), torch.zeros(2, 2)
    >>> attention = Half(Norm(), Linear(torch.cat([none, none, eye])), Linear(eye))
    >>> mlp = Half(Norm(), Linear(eye), Linear(none))
    >>> see = Attention(heads=1, groups=(1, 2, 2), lengths=None, suffix=0, causal=False)
    >>> transformer_block(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), attention, mlp, see, "relu")
    tensor([[[3., 5.],
             [5., 7.]]])
    """
    dtype, trained = backend.compute_dtype(x), (*attention.trained, *mlp.trained)
    backend.resolve(x, *attention.frozen, *mlp.frozen, *trained)
    if backend.needs_grad(x, *trained):
        return _TransformerBlock.apply(attention, mlp, see, activation, dtype, x, *trained)
    z, _ = attention_half.forward(x.reshape(-1, x.shape[2]), attention, see, dtype)
    return mlp_half.forward(z, mlp, activation, dtype)[0].view(x.shape)
