"""Class tokens where a modality is present, proxies where it is missing, summed; and how far proxies are from targets.

    fused[b]  = sum_j  c[j, b]                              if sample b has modality j
                       mean of p[m, j, b] over the m it has otherwise
    align     = sum over m != j of the mean over the samples that have both, and over d, of (p[m, j] - c[j])^2

M modalities, B samples, D wide: c = class_tokens [M, B, D], p = proxies [M, M, B, D] (source m, target j; the diagonal
is unused), present [B, M]. What an absent modality's rows hold, NaN included, reaches neither output, and their
gradient is 0. Sums and the loss are fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .backend import jit, tl
from .tiling import accumulator

TILE = {"BB": 16, "BD": 128, "num_warps": 4}


# ------------------------------------------------------------------------------------------------------------ reference
def _masks(present: Tensor):
    """has [M, B, 1]; both [M, M, B, 1]; lacks [M, M, B, 1]: the source is there, the target is not; sources [B, 1]."""
    has = present.t()[:, :, None]
    other = ~torch.eye(len(has), dtype=torch.bool, device=present.device)[:, :, None, None]
    both = has[:, None] & has[None] & other
    lacks = has[:, None] & ~has[None]
    return has, both, lacks, present.sum(1).clamp(min=1)[:, None]


def _reference(class_tokens, proxies, present, stop_gradient):
    wide = backend.wide(class_tokens.dtype)
    has, both, lacks, sources = _masks(present)
    c = torch.where(has, class_tokens, 0).to(wide)
    stand_in = torch.where(lacks, proxies, 0).to(wide).sum(0) / sources
    fused = (c + stand_in).sum(0).to(class_tokens.dtype)
    target = c.detach() if stop_gradient else c
    difference = torch.where(both, proxies.to(wide) - target, 0)
    count = both.sum(2).clamp(min=1) * class_tokens.shape[2]  # [M, M, 1]
    return fused, (difference.square().sum(2) / count).sum()


# --------------------------------------------------------------------------------------------------------------- Triton
@jit
def loss_weight(PRESENT, m: tl.constexpr, j: tl.constexpr, B, D, M: tl.constexpr, ACC: tl.constexpr, BB: tl.constexpr):
    """1 / (samples that have both m and j, times D); 1 where there are none."""
    count = tl.zeros((BB,), tl.int32)
    for b in range(0, B, BB):
        rb = b + tl.arange(0, BB)
        has_m = tl.load(PRESENT + rb * M + m, mask=rb < B, other=0)
        count += (has_m & tl.load(PRESENT + rb * M + j, mask=rb < B, other=0)).to(tl.int32)
    return 1.0 / tl.maximum(tl.sum(count, 0) * D, 1).to(ACC)


@jit
def available(PRESENT, rb, B, M: tl.constexpr):
    """How many modalities each sample of rb has, at least 1."""
    n = tl.zeros_like(rb)
    for m in tl.static_range(M):
        n += tl.load(PRESENT + rb * M + m, mask=rb < B, other=0).to(tl.int32)
    return tl.maximum(n, 1)


@jit(varying=("B",))
def substitute_forward(
    CLASS,  # [M, B, D]
    PROXIES,  # [M, M, B, D]
    PRESENT,  # [B, M] uint8
    FUSED,  # [B, D]
    LOSS,  # [programs] fp32
    B,
    D,
    M: tl.constexpr,
    ACC: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """A program owns BB samples and BD columns, and one part of the loss. Rows of absent modalities are not read."""
    rb = tl.program_id(0) * BB + tl.arange(0, BB)
    rd = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rb < B)[:, None] & (rd < D)[None, :]
    at = rb[:, None].to(tl.int64) * D + rd[None, :]
    size = tl.cast(B, tl.int64) * D
    sources = available(PRESENT, rb, B, M)
    fused = tl.zeros((BB, BD), ACC)
    loss = tl.zeros((BB, BD), ACC)
    for j in tl.static_range(M):
        has_j = tl.load(PRESENT + rb * M + j, mask=rb < B, other=0) != 0
        c = tl.load(CLASS + j * size + at, mask=mask & has_j[:, None], other=0.0).to(ACC)
        stand_in = tl.zeros((BB, BD), ACC)
        for m in tl.static_range(M):
            if m != j:
                has_m = tl.load(PRESENT + rb * M + m, mask=rb < B, other=0) != 0
                p = tl.load(PROXIES + (m * M + j) * size + at, mask=mask & has_m[:, None], other=0.0).to(ACC)
                stand_in += p
                difference = tl.where((has_m & has_j)[:, None], p - c, 0.0)
                loss += difference * difference * loss_weight(PRESENT, m, j, B, D, M, ACC, BB)
        fused += tl.where(has_j[:, None], c, stand_in / sources[:, None])
    tl.store(FUSED + at, fused.to(FUSED.dtype.element_ty), mask=mask)
    tl.store(LOSS + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(loss, 1), 0))


@jit(varying=("B",))
def substitute_backward(
    CLASS,  # [M, B, D]
    PROXIES,  # [M, M, B, D]
    PRESENT,  # [B, M] uint8
    D_FUSED,  # [B, D] or None
    D_ALIGN,  # [] or None
    D_CLASS,  # [M, B, D]
    D_PROXIES,  # [M, M, B, D]
    B,
    D,
    M: tl.constexpr,
    STOP: tl.constexpr,
    ACC: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """As forward: a program owns BB samples and BD columns of both gradients."""
    rb = tl.program_id(0) * BB + tl.arange(0, BB)
    rd = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (rb < B)[:, None] & (rd < D)[None, :]
    at = rb[:, None].to(tl.int64) * D + rd[None, :]
    size = tl.cast(B, tl.int64) * D
    sources = available(PRESENT, rb, B, M)
    g = tl.zeros((BB, BD), ACC)
    if D_FUSED is not None:
        g = tl.load(D_FUSED + at, mask=mask, other=0.0).to(ACC)
    for j in tl.static_range(M):
        has_j = tl.load(PRESENT + rb * M + j, mask=rb < B, other=0) != 0
        dc = tl.where(has_j[:, None], g, 0.0)
        if D_ALIGN is not None:
            c = tl.load(CLASS + j * size + at, mask=mask & has_j[:, None], other=0.0).to(ACC)
        for m in tl.static_range(M):
            dp = tl.zeros((BB, BD), ACC)
            if m != j:
                has_m = tl.load(PRESENT + rb * M + m, mask=rb < B, other=0) != 0
                dp = tl.where((has_m & (has_j == 0))[:, None], g / sources[:, None], 0.0)
                if D_ALIGN is not None:
                    both = (has_m & has_j)[:, None]
                    p = tl.load(PROXIES + (m * M + j) * size + at, mask=mask & both, other=0.0).to(ACC)
                    weight = 2 * tl.load(D_ALIGN).to(ACC) * loss_weight(PRESENT, m, j, B, D, M, ACC, BB)
                    pull = tl.where(both, p - c, 0.0) * weight
                    dp += pull
                    if not STOP:
                        dc -= pull
            tl.store(D_PROXIES + (m * M + j) * size + at, dp.to(D_PROXIES.dtype.element_ty), mask=mask)
        tl.store(D_CLASS + j * size + at, dc.to(D_CLASS.dtype.element_ty), mask=mask)


def _grid(class_tokens: Tensor) -> tuple[int, int]:
    return -(-class_tokens.shape[1] // TILE["BB"]), -(-class_tokens.shape[2] // TILE["BD"])


def forward_triton(class_tokens, proxies, present):
    """fused [B, D] and the alignment loss []."""
    fused = class_tokens.new_empty(class_tokens.shape[1:])
    parts = class_tokens.new_empty(_grid(class_tokens), dtype=backend.wide(class_tokens.dtype))
    class_tokens, proxies, present = backend.contiguous(class_tokens, proxies, present)
    m, b, d = class_tokens.shape
    backend.launch(
        substitute_forward,
        _grid(class_tokens),
        CLASS=class_tokens,
        PROXIES=proxies,
        PRESENT=present.view(torch.uint8),
        FUSED=fused,
        LOSS=parts,
        B=b,
        D=d,
        M=m,
        ACC=accumulator(class_tokens.dtype),
        **TILE,
    )
    return fused, parts.sum()


def backward_triton(d_fused, d_align, class_tokens, proxies, present, stop_gradient):
    """Gradients of class_tokens and proxies; either of the incoming two may be None."""
    class_tokens, proxies, present, d_fused = backend.contiguous(class_tokens, proxies, present, d_fused)
    m, b, d = class_tokens.shape
    d_class, d_proxies = torch.empty_like(class_tokens), torch.empty_like(proxies)
    backend.launch(
        substitute_backward,
        _grid(class_tokens),
        CLASS=class_tokens,
        PROXIES=proxies,
        PRESENT=present.view(torch.uint8),
        D_FUSED=d_fused,
        D_ALIGN=d_align,
        D_CLASS=d_class,
        D_PROXIES=d_proxies,
        B=b,
        D=d,
        M=m,
        STOP=stop_gradient,
        ACC=accumulator(class_tokens.dtype),
        **TILE,
    )
    return d_class, d_proxies


# ----------------------------------------------------------------------------------------------------------------- ATen
def backward_aten(d_fused, d_align, class_tokens, proxies, present, stop_gradient):
    """Gradients of class_tokens and proxies; either of the incoming two may be None."""
    wide = backend.wide(class_tokens.dtype)
    has, both, lacks, sources = _masks(present)
    zero = proxies.new_zeros((), dtype=wide)
    g = zero if d_fused is None else d_fused.to(wide)
    d_class, d_proxies = torch.where(has, g, zero), torch.where(lacks, g / sources, zero)
    d_class, d_proxies = d_class.expand(class_tokens.shape), d_proxies.expand(proxies.shape)
    if d_align is not None:
        count = both.sum(2, keepdim=True).clamp(min=1) * class_tokens.shape[2]
        pull = torch.where(both, proxies.to(wide) - class_tokens.to(wide), zero) * (2 * d_align / count)
        d_proxies = d_proxies + pull
        if not stop_gradient:
            d_class = d_class - pull.sum(0)
    return tuple(g.to(class_tokens.dtype).contiguous() for g in (d_class, d_proxies))


# -------------------------------------------------------------------------------------------------------- registration
def _forward_aten(class_tokens, proxies, present, stop_gradient):
    fused, align = _reference(class_tokens, proxies, present, stop_gradient)
    return fused.contiguous(), align


def _fake(class_tokens, *_):
    fused = class_tokens.new_empty(class_tokens.shape[1:])
    return fused, class_tokens.new_empty((), dtype=backend.wide(class_tokens.dtype))


substitute_op = backend.Op(
    "substitute(Tensor class_tokens, Tensor proxies, Tensor present, bool stop_gradient) -> (Tensor, Tensor)",
    aten=_forward_aten,
    triton=lambda class_tokens, proxies, present, _: forward_triton(class_tokens, proxies, present),
    fake=_fake,
)
substitute_backward_op = backend.Op(
    "substitute_backward(Tensor? d_fused, Tensor? d_align, Tensor class_tokens, Tensor proxies, Tensor present, "
    "bool stop_gradient) -> (Tensor, Tensor)",
    aten=backward_aten,
    triton=backward_triton,
    fake=lambda d_fused, d_align, c, p, *_: (c.new_empty(c.shape), p.new_empty(p.shape)),
)


class _Substitute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, class_tokens, proxies, present, stop_gradient):
        ctx.set_materialize_grads(False)
        ctx.stop_gradient = stop_gradient
        ctx.save_for_backward(class_tokens, proxies, present)
        return substitute_op(class_tokens, proxies, present, stop_gradient)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, d_fused, d_align):
        if d_fused is None and d_align is None:
            return None, None, None, None
        d_class, d_proxies = substitute_backward_op(d_fused, d_align, *ctx.saved_tensors, ctx.stop_gradient)
        needs = ctx.needs_input_grad
        return d_class if needs[0] else None, d_proxies if needs[1] else None, None, None


# --------------------------------------------------------------------------------------------------------------- public
def substitute(
    class_tokens: Tensor, proxies: Tensor, present: Tensor, stop_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """Fuse class tokens with stand-ins for those missing, and measure how well the stand-ins match.

    Args:
        class_tokens: [M, B, D], one per modality and sample.
        proxies: [M, M, B, D]; proxies[m, j] is what modality m says in place of class token j.
        present: [B, M] bool. A sample without any modality fuses to 0.
        stop_gradient: the alignment loss trains the proxies only, not the class tokens they are compared with.

    Returns:
        fused [B, D] in the dtype of class_tokens (under autocast the wider of both dtypes), and the alignment loss: a
        scalar in at least fp32, exactly 0 where no sample has two modalities.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit together.

    >>> c, p = torch.tensor([[[1.0]], [[5.0]]]), torch.tensor([[[[0.0]], [[3.0]]], [[[2.0]], [[0.0]]]])
    >>> substitute(c, p, torch.tensor([[True, False]]))[0], substitute(c, p, torch.tensor([[True, True]]))[1]
    (tensor([[4.]]), tensor(5.))
    """
    if backend.under_autocast(class_tokens.device.type):  # one may come from a linear, the other from a norm
        dtype = torch.promote_types(class_tokens.dtype, proxies.dtype)
        class_tokens, proxies = class_tokens.to(dtype), proxies.to(dtype)
    _check(class_tokens, proxies, present)
    if backend.resolve(class_tokens, proxies, present) == "reference":
        return _reference(class_tokens, proxies, present, stop_gradient)
    run = _Substitute.apply if backend.needs_grad(class_tokens, proxies) else substitute_op
    return run(class_tokens, proxies, present, stop_gradient)


def _check(class_tokens, proxies, present):
    if class_tokens.ndim != 3 or class_tokens.shape[0] == 0:
        raise ValueError(f"class_tokens must be [M, B, D] with M of at least 1, not {list(class_tokens.shape)}")
    m, b, d = class_tokens.shape
    if proxies.shape != (m, m, b, d):
        raise ValueError(f"proxies must be {[m, m, b, d]} to fit the class tokens, not {list(proxies.shape)}")
    if present.shape != (b, m):
        raise ValueError(f"present must be {[b, m]} to fit the class tokens, not {list(present.shape)}")
    if present.dtype != torch.bool:
        raise TypeError(f"present must be bool, not {present.dtype}: write present.bool()")
    if not class_tokens.is_floating_point() or class_tokens.dtype != proxies.dtype:
        raise TypeError(
            f"class_tokens and proxies must have one floating point dtype, not {class_tokens.dtype} and {proxies.dtype}"
        )
