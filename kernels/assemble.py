"""Learned rows joined to token rows, with LayerNorm and the low-rank product x A^T in the same pass.

    rows [B, T, D] = [prefix [P, D] | tokens [B, S, D], or mask_token [D] where the sample is absent | suffix [Q, D]]
    h    [B, T, D] = LayerNorm(rows) * norm_weight + norm_bias
    s    [B, T, R] = h A^T                                          A = lora_a [R, D],  T = P + S + Q

`tokens` holds every sample, or only those present, one after the other (packed). Rows of an absent sample in an
unpacked `tokens` are never used: whatever they hold, NaN included, reaches no output, and their gradient is exactly 0.

Statistics and sums over rows are fp32 (fp64 for fp64). Backward keeps the rows, their mean and 1 / standard deviation,
and recomputes h. The Triton kernel is in assemble_norm_project.py, the backward in assemble_backward.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .assemble_backward import backward_aten, backward_triton
from .assemble_norm_project import forward_triton, present_first
from .norm_aten import norm_aten
from .quantize import QuantizedRows, quantize_rows_aten, quantize_rows_reference


# ------------------------------------------------------------------------------------------------------------ reference
def _reference(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, dtype):
    """(rows, h or rows, s or None) in plain PyTorch."""
    rows = tokens
    if present is not None:
        if tokens.shape[0] != present.shape[0]:
            rows = tokens.new_zeros(present.shape[0], *tokens.shape[1:])
            rows[present] = tokens
        fill = tokens.new_zeros(()) if mask_token is None else mask_token.to(tokens.dtype)
        rows = torch.where(present[:, None, None], rows, fill)
    learned = [None if t is None else t.to(tokens.dtype).expand(rows.shape[0], -1, -1) for t in (prefix, suffix)]
    if prefix is not None or suffix is not None:
        rows = torch.cat([t for t in (learned[0], rows, learned[1]) if t is not None], 1)
    h = rows
    if norm_weight is not None:
        wide = backend.wide(tokens.dtype)
        bias = None if norm_bias is None else norm_bias.to(wide)
        h = F.layer_norm(rows.to(wide), rows.shape[-1:], norm_weight.to(wide), bias, eps)
    h = h.to(dtype)
    return rows, h, None if lora_a is None else F.linear(h, lora_a.to(dtype))


def _quantized_reference(h: Tensor) -> QuantizedRows:
    """`like` is h itself, which the reference of the product rounds once more in the same way."""
    q, scale = quantize_rows_reference(h.detach().flatten(0, 1))
    return QuantizedRows(h, q.view(h.shape), scale)


# ----------------------------------------------------------------------------------------------------------------- ATen
def _aten_assemble(tokens, prefix, suffix, present, mask_token) -> Tensor:
    batch = tokens.shape[0] if present is None else present.shape[0]
    first = 0 if prefix is None else prefix.shape[0]
    last = first + tokens.shape[1]
    rows = tokens.new_empty(batch, last + (0 if suffix is None else suffix.shape[0]), tokens.shape[2])
    if prefix is not None:
        rows[:, :first] = prefix
    if suffix is not None:
        rows[:, last:] = suffix
    middle = rows[:, first:last]
    if present is None:
        middle.copy_(tokens)
        return rows
    fill = tokens.new_zeros(1) if mask_token is None else mask_token.to(tokens.dtype)
    if tokens.shape[0] == batch:
        torch.where(present[:, None, None], tokens, fill, out=middle)
    else:
        order, packed = present_first(present), tokens.shape[0]
        middle.index_copy_(0, order[:packed], tokens)
        middle.index_copy_(0, order[packed:], fill.expand(batch - packed, *tokens.shape[1:]))
    return rows


def forward_aten(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, dtype, quantize):
    """(rows, h, s, mean, rstd, q, scale), None for what is not asked for or would equal what is there already."""
    rows = h = s = mean = rstd = q = scale = None
    if prefix is not None or suffix is not None or present is not None:
        rows = _aten_assemble(tokens, prefix, suffix, present, mask_token)
    source = tokens if rows is None else rows
    if norm_weight is not None:
        h, mean, rstd = norm_aten(source, norm_weight, norm_bias, eps)
        h, mean, rstd = h.to(dtype), mean.flatten(), rstd.flatten()
    elif dtype != tokens.dtype:
        h = source.to(dtype)
    if lora_a is not None:
        s = F.linear(source if h is None else h, lora_a.to(dtype))
    if quantize:
        written = source if h is None else h
        q, scale = quantize_rows_aten(written.flatten(0, 1))
        q, h = q.view(written.shape), None
    return rows, h, s, mean, rstd, q, scale


# ------------------------------------------------------------------------------------------------------------------ ops
@torch.library.custom_op(
    "u2a_fast::assemble_norm_project",
    mutates_args=(),
    schema="(Tensor tokens, Tensor? prefix, Tensor? suffix, Tensor? present, Tensor? mask_token, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? lora_a, float eps, ScalarType dtype, bool quantize) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, dtype, quantize):
    """rows [B, T, D], h [B, T, D] and s [B, T, R] in `dtype`, mean [B * T], rstd [B * T]; int8 q [B, T, D] and its
    scale [B * T].

    Empty where there is nothing to write: rows without learned rows, h where it equals the rows. With q, h is one zero,
    expanded: its gradient is that of q * scale.
    """
    forward = forward_triton if backend.resolve(tokens) == "triton" else forward_aten
    operands = tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a
    written = list(forward(*operands, eps, dtype, quantize))
    if quantize:
        written[1] = tokens.new_zeros(1, 1, 1, dtype=dtype).expand(written[5].shape)
    return tuple(tokens.new_empty(0) if t is None else t for t in written)


@_forward.register_fake
def _(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, dtype, quantize):
    learned = prefix is not None or suffix is not None or present is not None
    rank = None if lora_a is None else lora_a.shape[0]
    batch = tokens.shape[0] if present is None else present.shape[0]
    height = tokens.shape[1] + sum(t.shape[0] for t in (prefix, suffix) if t is not None)
    norm, wide, shape = norm_weight is not None, backend.wide(tokens.dtype), (batch, height, tokens.shape[2])

    def written(condition, shape, dtype):
        return tokens.new_empty(shape if condition else 0, dtype=dtype)

    h = written(norm or dtype != tokens.dtype, shape, dtype)
    return (
        written(learned, shape, tokens.dtype),
        tokens.new_zeros(1, 1, 1, dtype=dtype).expand(shape) if quantize else h,
        written(rank is not None, (batch, height, rank), dtype),
        written(norm, batch * height, wide),
        written(norm, batch * height, wide),
        written(quantize, shape, torch.int8 if quantize else tokens.dtype),
        written(quantize, batch * height, torch.float32 if quantize else tokens.dtype),
    )


@torch.library.custom_op(
    "u2a_fast::assemble_norm_project_backward",
    mutates_args=(),
    schema="(Tensor? d_rows, Tensor? d_h, Tensor? d_s, Tensor? rows, Tensor? mean, Tensor? rstd, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? lora_a, Tensor? present, SymInt packed, SymInt first, SymInt last, float eps, "
    "ScalarType dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@backend.outside_autocast
def _backward(
    d_rows, d_h, d_s, rows, mean, rstd, norm_weight, norm_bias, lora_a, present, packed, first, last, eps, dtype, needs
):
    """Gradients of tokens [packed, S, D] in `dtype` and, in fp32, of prefix, suffix, mask_token, norm_weight, norm_bias
    and lora_a; empty where `needs` is False. Token rows are first .. last of the T rows."""
    given = next(t for t in (d_rows, d_h, d_s) if t is not None)
    backward = backward_triton if backend.resolve(given) == "triton" else backward_aten
    operands = d_rows, d_h, d_s, rows, mean, rstd, norm_weight, norm_bias, lora_a, present
    grads = backward(*operands, packed, first, last, eps, dtype, needs)
    dtypes = (dtype, *[backend.wide(dtype)] * 6)
    return tuple(given.new_empty(0) if g is None else g.to(t) for g, t in zip(grads, dtypes, strict=True))


@_backward.register_fake
def _(
    d_rows, d_h, d_s, rows, mean, rstd, norm_weight, norm_bias, lora_a, present, packed, first, last, eps, dtype, needs
):
    given = next(t for t in (d_rows, d_h, d_s) if t is not None)
    height, width = given.shape[1], given.shape[2] if lora_a is None else lora_a.shape[1]
    rank = 0 if lora_a is None else lora_a.shape[0]
    shapes = ((packed, last - first, width), (first, width), (height - last, width), width, width, width, (rank, width))
    dtypes = (dtype, *[backend.wide(dtype)] * 6)
    return tuple(
        given.new_empty(shape if need else 0, dtype=t) for shape, t, need in zip(shapes, dtypes, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    tokens, prefix, suffix, present, _, norm_weight, norm_bias, lora_a, ctx.eps, dtype, quantize = inputs
    rows, h, _, mean, rstd, q, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(q, *(t for t in output if t.ndim == 1))  # statistics, and what was not written
    trained = [i for i in range(8) if i != 3]  # every tensor but `present`
    ctx.needs = [ctx.needs_input_grad[i] for i in trained]
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in trained]
    ctx.packed, ctx.first = tokens.shape[0], 0 if prefix is None else prefix.shape[0]
    ctx.last = ctx.first + tokens.shape[1]
    norm, learned = norm_weight is not None, not (prefix is None and suffix is None and present is None)
    kept = (rows if learned else tokens) if norm or ctx.needs[6] else None
    if kept is not None and dtype.itemsize < kept.dtype.itemsize and any(ctx.needs):
        kept = kept.to(dtype) if norm or quantize else h  # under autocast: kept as narrow as what is computed from it
    stats = (mean, rstd) if norm else (None, None)
    ctx.save_for_backward(kept, *stats, norm_weight, norm_bias, lora_a, present)


def _gradients(ctx, d_rows, d_h, d_s, *_):
    kept, mean, rstd, norm_weight, norm_bias, lora_a, present = ctx.saved_tensors
    # a compiled graph hands over an empty gradient for what was not written
    d_rows, d_h, d_s = (None if d is None or d.ndim == 1 else d for d in (d_rows, d_h, d_s))
    needs = list(ctx.needs)
    needs[4] = needs[4] and not (d_h is None and d_s is None)
    needs[5] = needs[5] and not (d_h is None and d_s is None)
    needs[6] = needs[6] and d_s is not None
    if not any(needs) or (d_rows is None and d_h is None and d_s is None):
        return (None,) * 11
    grads = _backward(
        d_rows,
        d_h,
        d_s,
        None if kept is None else kept.to(ctx.dtypes[0]),
        mean,
        rstd,
        norm_weight,
        norm_bias,
        lora_a,
        present,
        ctx.packed,
        ctx.first,
        ctx.last,
        ctx.eps,
        ctx.dtypes[0],
        needs,
    )
    grads = [g.to(t) if need else None for g, t, need in zip(grads, ctx.dtypes, needs, strict=True)]
    return *grads[:3], None, *grads[3:], None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _WithResidual(torch.autograd.Function):
    """The op on tokens alone, and the tokens as its rows, so that their two gradients are added where one is made."""

    @staticmethod
    def forward(tokens, *rest):
        return tokens.view_as(tokens), *_forward(tokens, *rest)[1:]

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


# --------------------------------------------------------------------------------------------------------------- public
def assemble(
    tokens: Tensor,
    prefix: Tensor | None = None,
    suffix: Tensor | None = None,
    present: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Join learned rows to the token rows of every sample.

    Args:
        tokens: [B, S, D]; or, where `present` marks n of B samples, only theirs: [n, S, D].
        prefix: [P, D] rows before every sample's tokens. They take the dtype of `tokens`, as all learned rows do.
        suffix: [Q, D] rows after them.
        present: [B] bool, False where the sample's tokens are absent: they may then hold anything.
        mask_token: [D], takes the place of each of an absent sample's tokens (zeros without it).

    Returns:
        [B, P + S + Q, D]; `tokens` itself where there is nothing to join.

    Raises:
        TypeError, ValueError: dtypes, shapes or counts that do not fit together.

    >>> assemble(torch.ones(2, 1, 3), suffix=torch.zeros(1, 3), present=torch.tensor([True, False]))[:, :, 0]
    tensor([[1., 0.],
            [0., 0.]])
    """
    _check(tokens, prefix, suffix, present, mask_token, None, None, None)
    if backend.resolve(tokens, prefix, suffix, present, mask_token) == "reference":
        return _reference(tokens, prefix, suffix, present, mask_token, None, None, None, 0.0, tokens.dtype)[0]
    if prefix is None and suffix is None and present is None:
        return tokens
    fill = None if present is None else mask_token
    return _forward(tokens, prefix, suffix, present, fill, None, None, None, 0.0, tokens.dtype, False)[0]


def assemble_norm_project(
    *,
    tokens: Tensor,
    prefix: Tensor | None = None,
    suffix: Tensor | None = None,
    present: Tensor | None = None,
    mask_token: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    lora_a: Tensor | None = None,
    quantize: bool = False,
) -> tuple[Tensor | QuantizedRows, Tensor | None, Tensor]:
    """`assemble`, LayerNorm over D and the product with lora_a^T, in one pass over the rows.

    Args:
        tokens, prefix, suffix, present, mask_token: as in `assemble`.
        norm_weight: [D]; without it the rows are not normalised.
        norm_bias: [D], may be left out.
        eps: added to the variance.
        lora_a: [R, D], cast to the compute dtype; its gradient has its own.
        quantize: give h as int8 rows, for `linear_lowrank` over an int8 weight (W8A8); s is made from h before.

    Returns:
        The normalised rows h [B, T, D], s = h lora_a^T [B, T, R] (None without `lora_a`), and the assembled rows
        [B, T, D] for the residual. h and s are in the autocast dtype under autocast, the rows in that of `tokens`.
        Where two would hold the same values they share memory: without a norm, h is the rows; without learned rows,
        the rows are `tokens` (a view of them where they need a gradient).

    Raises:
        TypeError, ValueError: dtypes, shapes or counts that do not fit together.
    """
    _check(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a)
    dtype = backend.in_autocast_dtype(tokens.new_empty(0)).dtype
    fill = None if present is None else mask_token
    operands = tokens, prefix, suffix, present, fill, norm_weight, norm_bias, lora_a, eps, dtype
    if backend.resolve(*operands[:8]) == "reference":
        rows, h, s = _reference(*operands)
        return _quantized_reference(h) if quantize else h, s, rows
    learned = prefix is not None or suffix is not None or present is not None
    same = norm_weight is None and dtype == tokens.dtype
    if same and not learned and lora_a is None and not quantize:
        return tokens, None, tokens
    if learned:
        rows, h, s, _, _, q, scale = _forward(*operands, quantize)
    elif torch.is_grad_enabled() and tokens.requires_grad:
        rows, h, s, _, _, q, scale = _WithResidual.apply(*operands, quantize)
    else:
        rows, (_, h, s, _, _, q, scale) = tokens, _forward(*operands, quantize)
    if quantize:
        h = QuantizedRows(h, q, scale)
    elif same:
        h = rows
    return h, None if lora_a is None else s, rows


def _check(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a):
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be floating point [B, S, D], not {tokens.dtype} {list(tokens.shape)}")
    width = tokens.shape[2]
    named = {"prefix": (prefix, 2), "suffix": (suffix, 2), "mask_token": (mask_token, 1)}
    named |= {"norm_weight": (norm_weight, 1), "norm_bias": (norm_bias, 1), "lora_a": (lora_a, 2)}
    for name, (t, ndim) in named.items():
        if t is not None and (t.ndim != ndim or t.shape[-1] != width or not t.is_floating_point()):
            expected = f"[rows, {width}]" if ndim == 2 else f"[{width}]"
            raise ValueError(
                f"{name} must be floating point {expected} to fit the tokens, not {t.dtype} {list(t.shape)}"
            )
    if lora_a is not None and lora_a.shape[0] == 0:
        raise ValueError(f"lora_a must have at least one row, not {list(lora_a.shape)}: leave it out instead")
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias was given without norm_weight: give both, or neither to skip the norm")
    if present is None:
        return
    if present.ndim != 1 or present.dtype != torch.bool:
        raise TypeError(f"present must be a bool tensor [B], not {present.dtype} {list(present.shape)}")
    batch, packed = present.shape[0], tokens.shape[0]
    if batch != packed and not torch.compiler.is_compiling():  # counting waits for the device: only for packed tokens
        count = int(present.sum())
        if count != packed:
            raise ValueError(
                f"tokens hold {packed} samples, which is neither all {batch} of `present` nor the {count} it marks: "
                "give every sample, or only those present"
            )
