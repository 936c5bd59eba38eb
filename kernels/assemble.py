"""Learned rows joined to token rows, with LayerNorm and the low-rank product x A^T in the same pass.

    rows [B, T, D] = [prefix [P, D] | tokens [B, S, D], or mask_token [D] where the sample is absent | suffix [Q, D]]
    h    [B, T, D] = LayerNorm(rows) * norm_weight + norm_bias      or RMSNorm(rows) * norm_weight
    s    [B, T, R] = h A^T                                          A = lora_a [R, D],  T = P + S + Q

`tokens` holds every sample, or only those present, one after the other (packed). Rows of an absent sample in an
unpacked `tokens` are never used: whatever they hold, NaN included, reaches no output, and their gradient is exactly 0.

Statistics and sums over rows are fp32 (fp64 for fp64). Backward keeps the rows, their mean and 1 / standard deviation,
and recomputes h. ATen calls are in assemble_aten.py, Triton kernels in assemble_norm_project.py (forward) and
assemble_backward.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend
from .assemble_aten import Assembled, Leaves, backward_aten, forward_aten
from .assemble_backward import backward_triton
from .assemble_norm_project import forward_triton
from .norm_aten import norm_reference
from .quantize import QuantizedRows, quantize_rows_reference


# ------------------------------------------------------------------------------------------------------------ reference
def _reference(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, rms, dtype):
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
        h = norm_reference(rows, norm_weight, norm_bias, eps, rms)
    h = h.to(dtype)
    return rows, h, None if lora_a is None else F.linear(h, lora_a.to(dtype))


def _quantized_reference(h: Tensor) -> QuantizedRows:
    """`like` is h itself, which the reference of the product rounds once more in the same way."""
    q, scale = quantize_rows_reference(h.detach().flatten(0, 1))
    return QuantizedRows(h, q.view(h.shape), scale)


# -------------------------------------------------------------------------------------------------------- registration
def _with(forward):
    def run(*operands):
        """With q, h is one zero, expanded: its gradient is that of q * scale."""
        written = forward(*operands)
        if written.q is None:
            return written
        return written._replace(h=operands[0].new_zeros(1, 1, 1, dtype=operands[10]).expand(written.q.shape))

    return run


def _fake(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, rms, dtype, quantize):
    learned = prefix is not None or suffix is not None or present is not None
    batch = tokens.shape[0] if present is None else present.shape[0]
    height = tokens.shape[1] + sum(t.shape[0] for t in (prefix, suffix) if t is not None)
    norm, wide, shape = norm_weight is not None, backend.wide(tokens.dtype), (batch, height, tokens.shape[2])

    def written(condition, *shape, dtype=dtype):
        return tokens.new_empty(shape, dtype=dtype) if condition else None

    h = written(norm or dtype != tokens.dtype, *shape)
    return Assembled(
        rows=written(learned, *shape, dtype=tokens.dtype),
        h=tokens.new_zeros(1, 1, 1, dtype=dtype).expand(shape) if quantize else h,
        s=None if lora_a is None else tokens.new_empty(batch, height, lora_a.shape[0], dtype=dtype),
        mean=written(norm and not rms, batch * height, dtype=wide),
        rstd=written(norm, batch * height, dtype=wide),
        q=written(quantize, *shape, dtype=torch.int8),
        scale=written(quantize, batch * height, dtype=torch.float32),
    )


assemble_forward = backend.Op(
    "assemble_norm_project(Tensor tokens, Tensor? prefix, Tensor? suffix, Tensor? present, Tensor? mask_token, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? lora_a, float eps, bool rms, ScalarType dtype, bool quantize) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    aten=_with(forward_aten),
    triton=_with(forward_triton),
    fake=_fake,
)


def _with_needs(backward):
    def run(*operands):
        """Gradients of what `needs` names: of the tokens in `dtype`, of all else in fp32 at least."""
        *operands, dtype, needs = operands
        grads, wide = backward(*operands, dtype, Leaves(*needs)), backend.wide(dtype)
        return [grads[0], *(g if g is None or g.dtype == wide else g.to(wide) for g in grads[1:])]

    return run


def _fake_backward(
    d_rows, d_h, d_s, rows, mean, rstd, norm_weight, norm_bias, lora_a, present, packed, first, last, eps, dtype, needs
):
    given = next(t for t in (d_rows, d_h, d_s) if t is not None)
    height, width = given.shape[1], given.shape[2] if lora_a is None else lora_a.shape[1]
    rank = 0 if lora_a is None else lora_a.shape[0]
    shapes = ((packed, last - first, width), (first, width), (height - last, width), width, width, width, (rank, width))
    dtypes = (dtype, *[backend.wide(dtype)] * 6)
    return tuple(
        given.new_empty(shape, dtype=t) if need else None for shape, t, need in zip(shapes, dtypes, needs, strict=True)
    )


assemble_backward = backend.Op(
    "assemble_norm_project_backward(Tensor? d_rows, Tensor? d_h, Tensor? d_s, Tensor? rows, Tensor? mean, "
    "Tensor? rstd, Tensor? norm_weight, Tensor? norm_bias, Tensor? lora_a, Tensor? present, SymInt packed, "
    "SymInt first, SymInt last, float eps, ScalarType dtype, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    aten=_with_needs(backward_aten),
    triton=_with_needs(backward_triton),
    fake=_fake_backward,
)


class _AssembleNormProject(torch.autograd.Function):
    """(rows, h, s, q, scale). Without learned rows the tokens are the rows: the gradients of both are added here."""

    @staticmethod
    def forward(ctx, *operands):
        tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, _, dtype, quantize = operands
        written = Assembled(*assemble_forward(*operands))
        leaves = Leaves(tokens, prefix, suffix, mask_token, norm_weight, norm_bias, lora_a)
        asked = ctx.needs_input_grad
        ctx.needs = Leaves(asked[0], asked[1], asked[2], asked[4], asked[5], asked[6], asked[7])
        ctx.dtypes = Leaves(*(None if t is None else t.dtype for t in leaves))
        ctx.packed, ctx.first, ctx.eps = tokens.shape[0], 0 if prefix is None else prefix.shape[0], eps
        ctx.last = ctx.first + tokens.shape[1]
        ctx.set_materialize_grads(False)
        if written.q is not None:
            ctx.mark_non_differentiable(written.q, written.scale)
        rows = tokens if written.rows is None else written.rows
        kept = rows if norm_weight is not None or ctx.needs.lora_a else None
        if kept is not None and dtype.itemsize < kept.dtype.itemsize:
            # under autocast: kept as narrow as what is computed from it
            kept = kept.to(dtype) if norm_weight is not None or quantize else written.h
        ctx.save_for_backward(kept, written.mean, written.rstd, norm_weight, norm_bias, lora_a, present)
        rows = tokens.view_as(tokens) if written.rows is None else rows
        return rows, written.h, written.s, written.q, written.scale

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_rows, d_h, d_s, _q, _scale):
        kept, mean, rstd, norm_weight, norm_bias, lora_a, present = ctx.saved_tensors
        through_h = d_h is not None or d_s is not None
        needs = ctx.needs._replace(
            norm_weight=ctx.needs.norm_weight and through_h,
            norm_bias=ctx.needs.norm_bias and through_h,
            lora_a=ctx.needs.lora_a and d_s is not None,
        )
        if not any(needs) or not (through_h or d_rows is not None):
            return (None,) * 12
        kept = None if kept is None else kept.to(ctx.dtypes.tokens)
        saved = kept, mean, rstd, norm_weight, norm_bias, lora_a, present
        places = ctx.packed, ctx.first, ctx.last, ctx.eps, ctx.dtypes.tokens
        grads = assemble_backward(d_rows, d_h, d_s, *saved, *places, list(needs))
        grads = zip(grads, ctx.dtypes, strict=True)
        grads = Leaves(*(g if g is None or g.dtype == t else g.to(t) for g, t in grads))
        return (
            grads.tokens,
            grads.prefix,
            grads.suffix,
            None,
            grads.mask_token,
            grads.norm_weight,
            grads.norm_bias,
            grads.lora_a,
            None,
            None,
            None,
            None,
        )


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
        return _reference(tokens, prefix, suffix, present, mask_token, None, None, None, 0.0, False, tokens.dtype)[0]
    if prefix is None and suffix is None and present is None:
        return tokens
    fill = None if present is None else mask_token
    operands = tokens, prefix, suffix, present, fill, None, None, None, 0.0, False, tokens.dtype, False
    run = _AssembleNormProject.apply if backend.needs_grad(tokens, prefix, suffix, fill) else assemble_forward
    return run(*operands)[0]


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
    rms: bool = False,
) -> tuple[Tensor | QuantizedRows, Tensor | None, Tensor]:
    """`assemble`, LayerNorm or RMSNorm over D and the product with lora_a^T, in one pass over the rows.

    Args:
        tokens, prefix, suffix, present, mask_token: as in `assemble`.
        norm_weight: [D]; without it the rows are not normalised.
        norm_bias: [D], may be left out.
        eps: added to the variance.
        lora_a: [R, D], cast to the compute dtype; its gradient has its own.
        quantize: give h as int8 rows, for `linear_lowrank` over an int8 weight (W8A8); s is made from h before.
        rms: RMSNorm, which has no `norm_bias`.

    Returns:
        The normalised rows h [B, T, D], s = h lora_a^T [B, T, R] (None without `lora_a`), and the assembled rows
        [B, T, D] for the residual. h and s are in the autocast dtype under autocast, the rows in that of `tokens`.
        Where two would hold the same values they share memory: without a norm, h is the rows; without learned rows,
        the rows are `tokens` (a view of them where they need a gradient).

    Raises:
        TypeError, ValueError: dtypes, shapes or counts that do not fit together.
    """
    _check(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a)
    dtype = backend.compute_dtype(tokens)
    fill = None if present is None else mask_token
    operands = tokens, prefix, suffix, present, fill, norm_weight, norm_bias, lora_a, eps, rms, dtype
    if backend.resolve(*operands[:8]) == "reference":
        rows, h, s = _reference(*operands)
        return _quantized_reference(h) if quantize else h, s, rows
    same = norm_weight is None and dtype == tokens.dtype
    if lora_a is None and same and not quantize and prefix is None and suffix is None and present is None:
        return tokens, None, tokens
    if backend.needs_grad(tokens, prefix, suffix, fill, norm_weight, norm_bias, lora_a):
        rows, h, s, q, scale = _AssembleNormProject.apply(*operands, quantize)
    else:
        rows, h, s, _, _, q, scale = assemble_forward(*operands, quantize)
        rows = tokens if rows is None else rows
    if quantize:
        h = QuantizedRows(h, q, scale)
    elif same:
        h = rows
    return h, s, rows


def _check(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a):
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be floating point [B, S, D], not {tokens.dtype} {list(tokens.shape)}")
    width = tokens.shape[2]
    for name, t, ndim in (
        ("prefix", prefix, 2),
        ("suffix", suffix, 2),
        ("mask_token", mask_token, 1),
        ("norm_weight", norm_weight, 1),
        ("norm_bias", norm_bias, 1),
        ("lora_a", lora_a, 2),
    ):
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
