"""The Triton kernels of the backward of `assemble` and `assemble_norm_project` (assemble.py has the formulas).

backward     16 rows a program: dH = d_h + d_s A, the norm's backward, and fp32 partial sums over the program's rows
             for what is summed over rows. Learned rows are written per sample and summed over samples afterwards.
lora_grad    dA = d_s^T h with h normalised again, in row ranges summed in a fixed order. It reads the rows once more:
             inside `backward`, partial sums of dA for each program would outweigh the rows themselves.

M = B * T rows, T = P + N + Q of them in a sample (prefix, tokens, suffix), K columns, R ranks.
"""

from __future__ import annotations

from . import backend
from .assemble_aten import Leaves
from .assemble_norm_project import normalise, sources
from .backend import jit, tl
from .reduce import REDUCE_TILE, launch_sum_parts, splits
from .tiling import accumulator, dot_precision, rank_tile

BACKWARD_TILE = {"BM": 16, "BK": 256, "num_warps": 8, "num_stages": 2}


@jit
def normalised_grad(
    D_H, D_S, A, rm, ok, rk, kok, K, PITCH, R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of h: d_h + d_s A, [BM, BK]."""
    g = tl.zeros((BM, BK), ACC)
    if D_H is not None:
        at = D_H + rm[:, None].to(tl.int64) * PITCH + rk[None, :]
        g = tl.load(at, mask=ok[:, None] & kok[None, :], other=0.0).to(ACC)
    if D_S is not None:
        for r in tl.range(0, R, BR, num_stages=1):
            rr = r + tl.arange(0, BR)
            ds_at = D_S + rm[:, None].to(tl.int64) * R + rr[None, :]
            ds = tl.load(ds_at, mask=ok[:, None] & (rr < R)[None, :], other=0.0)
            a = tl.load(A + rr[:, None] * K + rk[None, :], mask=(rr < R)[:, None] & kok[None, :], other=0.0)
            g = tl.dot(ds, a, g, out_dtype=ACC, input_precision=PRECISION)
    return g


@jit(varying=("M", "T", "P", "N"))
def assemble_norm_project_backward(
    D_ROWS,  # [M, K] or None
    D_H,  # [M, K], rows PITCH apart, or None
    D_S,  # [M, R] or None
    ROWS,  # [M, K], given with GAMMA
    MEAN,  # [M], given with GAMMA; None: RMSNorm
    RSTD,  # [M], given with GAMMA
    GAMMA,  # [K] or None: no norm
    A,  # [R, K], given with D_S
    SOURCE,  # [B] int32: where sample b stands in D_TOKENS, -1 if absent; None: at b
    D_TOKENS,  # [samples, N, K] or None
    D_LEARNED,  # [B, P + Q, K] fp32 or None: prefix and suffix of each sample
    D_MASK,  # [programs, K] fp32 or None
    D_GAMMA,  # [programs, K] fp32 or None
    D_BETA,  # [programs, K] fp32 or None
    M,
    T,
    P,
    N,
    K,
    PITCH,
    R: tl.constexpr,
    PACKED: tl.constexpr,  # D_TOKENS has no rows for absent samples
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """First sweep: the means of the norm's backward, two or one. Second, from cache: the gradients."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    ok = rm < M
    b = rm // T
    t = rm % T
    token = ok & (t >= P) & (t < P + N)
    absent = rm < 0  # nobody
    slot = b
    if SOURCE is not None:
        source = tl.load(SOURCE + b, mask=ok, other=0)
        absent = token & (source < 0)
        if PACKED:
            slot = source
    row = rm[:, None].to(tl.int64) * K
    part = tl.program_id(0).to(tl.int64) * K
    token_at = D_TOKENS
    if D_TOKENS is not None:
        token_at = D_TOKENS + (slot.to(tl.int64) * N + (t - P))[:, None] * K
    learned_at = D_LEARNED
    if D_LEARNED is not None:
        learned_at = D_LEARNED + (b.to(tl.int64) * (T - N) + tl.where(t < P, t, t - N))[:, None] * K
    mean = tl.zeros((BM,), ACC)
    rstd = mean
    along = mean
    level = mean
    if GAMMA is not None:
        if MEAN is not None:
            mean = tl.load(MEAN + rm, mask=ok, other=0.0)
        rstd = tl.load(RSTD + rm, mask=ok, other=0.0)
        for k in range(0, K, BK):
            kok = rk < K - k
            g = normalised_grad(D_H, D_S, A, rm, ok, k + rk, kok, K, PITCH, R, ACC, PRECISION, BM, BK, BR)
            g *= tl.load(GAMMA + k + rk, mask=kok, other=0.0).to(ACC)[None, :]
            x = tl.load(ROWS + row + (k + rk)[None, :], mask=ok[:, None] & kok[None, :], other=0.0).to(ACC)
            along += tl.sum(g * ((x - mean[:, None]) * rstd[:, None]), 1)
            if MEAN is not None:
                level += tl.sum(g, 1)
    # The gradient of h is made again rather than kept: BM rows of K columns do not fit into registers.
    for k in range(0, K, BK):
        kok = rk < K - k
        mask = ok[:, None] & kok[None, :]
        g = normalised_grad(D_H, D_S, A, rm, ok, k + rk, kok, K, PITCH, R, ACC, PRECISION, BM, BK, BR)
        if GAMMA is not None:
            x = tl.load(ROWS + row + (k + rk)[None, :], mask=mask, other=0.0).to(ACC)
            xhat = (x - mean[:, None]) * rstd[:, None]
            if D_GAMMA is not None:
                tl.store(D_GAMMA + part + k + rk, tl.sum(g * xhat, 0), mask=kok)
            if D_BETA is not None:
                tl.store(D_BETA + part + k + rk, tl.sum(g, 0), mask=kok)
            g *= tl.load(GAMMA + k + rk, mask=kok, other=0.0).to(ACC)[None, :]
            g = (g - (xhat * along[:, None] + level[:, None]) / K) * rstd[:, None]
        if D_ROWS is not None:
            g += tl.load(D_ROWS + row + (k + rk)[None, :], mask=mask, other=0.0).to(ACC)
        if D_TOKENS is not None:
            wanted = token & ~absent if PACKED else token
            value = tl.where(absent[:, None], 0.0, g).to(D_TOKENS.dtype.element_ty)
            tl.store(token_at + (k + rk)[None, :], value, mask=wanted[:, None] & kok[None, :])
        if D_LEARNED is not None:
            tl.store(learned_at + (k + rk)[None, :], g, mask=(ok & ~token)[:, None] & kok[None, :])
        if D_MASK is not None:
            tl.store(D_MASK + part + k + rk, tl.sum(tl.where(absent[:, None], g, 0.0), 0), mask=kok)


@jit(varying=("M", "SPLIT"))
def assemble_norm_project_lora_grad(
    D_S,  # [M, R]
    ROWS,  # [M, K]
    MEAN,  # [M], given with GAMMA; None: RMSNorm
    RSTD,  # [M], given with GAMMA
    GAMMA,  # [K] or None: no norm
    BETA,  # [K] or None
    PARTS,  # [SPLIT, R, K] fp32
    M,
    K,
    SPLIT,
    R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """Each program owns BC columns, BR ranks and one range of the M rows, and so one place in PARTS."""
    rc = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(1)
    rr = tl.program_id(2) * BR + tl.arange(0, BR)
    cok = rc < K
    rows = tl.cdiv(tl.cdiv(M, BM), SPLIT) * BM
    acc = tl.zeros((BR, BC), ACC)
    for m in range(split * rows, min((split + 1) * rows, M), BM):
        rm = m + tl.arange(0, BM)
        ok = rm < M
        x = tl.load(ROWS + rm[:, None].to(tl.int64) * K + rc[None, :], mask=ok[:, None] & cok[None, :], other=0.0)
        mean = tl.zeros((BM,), ACC)
        rstd = mean
        if GAMMA is not None:
            if MEAN is not None:
                mean = tl.load(MEAN + rm, mask=ok, other=0.0)
            rstd = tl.load(RSTD + rm, mask=ok, other=0.0)
        at = D_S + rm[None, :].to(tl.int64) * R + rr[:, None]
        ds = tl.load(at, mask=ok[None, :] & (rr < R)[:, None], other=0.0)
        h = normalise(x, mean, rstd, GAMMA, BETA, rc, cok, ACC).to(ds.dtype)
        acc = tl.dot(ds, h, acc, out_dtype=ACC, input_precision=PRECISION)
    place = PARTS + split.to(tl.int64) * R * K + rr[:, None] * K + rc[None, :]
    tl.store(place, acc, mask=(rr < R)[:, None] & cok[None, :])


def backward_triton(
    d_rows, d_h, d_s, rows, mean, rstd, norm_weight, norm_bias, lora_a, present, packed, first, last, eps, dtype, needs
):
    """As `backward_aten`."""
    d_rows, d_s, rows = backend.contiguous(d_rows, d_s, rows)
    if d_h is not None and (d_h.stride(2) != 1 or d_h.stride(0) != d_h.shape[1] * d_h.stride(1)):
        d_h = d_h.contiguous()
    norm_weight, norm_bias = backend.contiguous(norm_weight, norm_bias)
    d_a = _lora_grad(d_s, rows, mean, rstd, norm_weight, norm_bias) if needs.lora_a else None
    if not any(needs[:6]):
        return Leaves(*[None] * 6, d_a)
    if lora_a is None:  # d_h has its part of it already
        d_s = None
    given = next(t for t in (d_rows, d_h, d_s) if t is not None)
    (batch, height), wide = given.shape[:2], backend.wide(dtype)
    k = given.shape[2] if lora_a is None else lora_a.shape[1]
    r, programs = 1 if d_s is None else d_s.shape[2], -(-batch * height // BACKWARD_TILE["BM"])

    def new(wanted, *shape, dtype=wide):
        return given.new_empty(shape, dtype=dtype) if wanted else None

    d_tokens = new(needs.tokens, packed, last - first, k, dtype=dtype)
    d_learned = new(needs.prefix or needs.suffix, batch, first + height - last, k)
    partial = [new(need, programs, k) for need in (needs.mask_token, needs.norm_weight, needs.norm_bias)]
    backend.launch(
        assemble_norm_project_backward,
        (programs,),
        D_ROWS=d_rows,
        D_H=d_h,
        D_S=d_s,
        ROWS=rows,
        MEAN=mean,
        RSTD=rstd,
        GAMMA=None if d_h is None and d_s is None else norm_weight,
        A=None if d_s is None else backend.cast(lora_a, d_s.dtype).contiguous(),
        SOURCE=sources(present, packed),
        D_TOKENS=d_tokens,
        D_LEARNED=d_learned,
        D_MASK=partial[0],
        D_GAMMA=partial[1],
        D_BETA=partial[2],
        M=batch * height,
        T=height,
        P=first,
        N=last - first,
        K=k,
        PITCH=k if d_h is None else d_h.stride(1),
        R=r,
        PACKED=packed != batch,
        ACC=accumulator(dtype),
        PRECISION=dot_precision(dtype),
        BR=rank_tile(r),
        **BACKWARD_TILE,
    )
    d_prefix = d_learned[:, :first].sum(0) if needs.prefix else None
    d_suffix = d_learned[:, first:].sum(0) if needs.suffix else None
    return Leaves(d_tokens, d_prefix, d_suffix, *(None if t is None else t.sum(0) for t in partial), d_a)


def _lora_grad(d_s, rows, mean, rstd, norm_weight, norm_bias):
    """dA = d_s^T h [R, K]"""
    r, k = d_s.shape[2], rows.shape[2]
    m, wide = rows.shape[0] * rows.shape[1], backend.wide(rows.dtype)
    split, block = splits(m, r), rank_tile(r)
    parts = rows.new_empty(split, r, k, dtype=wide)
    backend.launch(
        assemble_norm_project_lora_grad,
        (-(-k // REDUCE_TILE["BC"]), split, -(-r // block)),
        D_S=d_s,
        ROWS=rows,
        MEAN=mean,
        RSTD=rstd,
        GAMMA=norm_weight,
        BETA=norm_bias,
        PARTS=parts,
        M=m,
        K=k,
        SPLIT=split,
        R=r,
        ACC=accumulator(rows.dtype),
        PRECISION=dot_precision(rows.dtype),
        BR=block,
        **REDUCE_TILE,
    )
    return parts[0] if split == 1 else launch_sum_parts(parts, 1.0, wide)[0]
