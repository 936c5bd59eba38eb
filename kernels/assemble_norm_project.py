"""The Triton kernel of `assemble` and `assemble_norm_project` (assemble.py has the formulas and the other backends).

16 rows a program, in pieces of 256 columns: gather, norm, h and s = h A^T; a row's second reading comes from
cache. Which row of which tensor is read is chosen among pointers, so absent tokens are not touched and nothing is
copied beforehand. The backward is in assemble_backward.py, the same in ATen in assemble_aten.py.

M = B * T rows, T = P + N + Q of them in a sample (prefix, tokens, suffix), K columns, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend
from .assemble_aten import Assembled
from .backend import jit, tl
from .norm_aten import refuse_bias
from .quantize import TINY, round_half_even
from .tiling import accumulator, dot_precision, element_type, rank_tile

FORWARD_TILE = {"BM": 16, "BK": 256, "num_warps": 4, "num_stages": 2}


# ------------------------------------------------------------------------------------------------------------- forward
@jit
def row_address(rm, TOKENS, PREFIX, SUFFIX, SOURCE, MASK, M, T, P, N, K, ALIGNED: tl.constexpr):
    """Pointers [BM] to the first column of what output rows rm are made of.

    Chosen as numbers: for AMD, Triton before 3.9 fails to compile a choice between pointers into several tensors.
    """
    b = rm // T
    t = rm % T
    source = b
    if SOURCE is not None:
        source = tl.load(SOURCE + b, mask=rm < M, other=0)
    address = (TOKENS + (source.to(tl.int64) * N + (t - P)) * K).to(tl.int64)
    if SOURCE is not None:
        address = tl.where(source < 0, MASK.to(tl.int64), address)
    if PREFIX is not None:
        address = tl.where(t < P, (PREFIX + t * K).to(tl.int64), address)
    if SUFFIX is not None:
        address = tl.where(t >= P + N, (SUFFIX + (t - P - N) * K).to(tl.int64), address)
    base = address.to(TOKENS.dtype)
    if ALIGNED:  # a choice between pointers forgets their alignment: rows would be read two bytes at a time
        base = tl.multiple_of(base, 16)
    return base


@jit
def row_statistics(base, ok, K, eps, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and 1 / standard deviation of each row: those of every piece, merged into the running ones."""
    rk = tl.arange(0, BK)
    mean = tl.zeros((BM,), ACC)
    squares = tl.zeros((BM,), ACC)
    for k in range(0, K, BK):
        kok = rk < K - k
        x = tl.load(base[:, None] + (k + rk)[None, :], mask=ok[:, None] & kok[None, :], other=0.0).to(ACC)
        # Chan's update: the difference of two large sums would lose the variance
        n = tl.minimum(K - k, BK).to(ACC)
        piece = tl.sum(x, 1) / n
        d = tl.where(kok[None, :], x - piece[:, None], 0.0)  # the tail must not enter the variance
        shift = piece - mean
        mean += shift * (n / (k + n))
        squares += tl.sum(d * d, 1) + shift * shift * (k * (n / (k + n)))
    return mean, tl.rsqrt(squares / K + eps)


@jit
def row_rstd(base, ok, K, eps, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """RMSNorm's 1 / root mean square of each row."""
    rk = tl.arange(0, BK)
    squares = tl.zeros((BM,), ACC)
    for k in range(0, K, BK):
        x = tl.load(base[:, None] + (k + rk)[None, :], mask=ok[:, None] & (rk < K - k)[None, :], other=0.0).to(ACC)
        squares += tl.sum(x * x, 1)
    return tl.rsqrt(squares / K + eps)


@jit
def normalise(x, mean, rstd, GAMMA, BETA, rk, kok, ACC: tl.constexpr):
    """The norm of a tile x [BM, BK] of columns rk, of mean 0 for RMSNorm; x itself without GAMMA."""
    if GAMMA is not None:
        gamma = tl.load(GAMMA + rk, mask=kok, other=0.0).to(ACC)
        x = (x.to(ACC) - mean[:, None]) * rstd[:, None] * gamma[None, :]
        if BETA is not None:
            x += tl.load(BETA + rk, mask=kok, other=0.0).to(ACC)[None, :]
    return x


@jit
def row_scale(
    base, ok, mean, rstd, GAMMA, BETA, K, TYPE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The int8 step of each row of h as it is stored: its largest magnitude / 127."""
    rk = tl.arange(0, BK)
    largest = tl.zeros((BM,), tl.float32)
    for k in range(0, K, BK):
        kok = rk < K - k
        x = tl.load(base[:, None] + (k + rk)[None, :], mask=ok[:, None] & kok[None, :], other=0.0)
        h = normalise(x, mean, rstd, GAMMA, BETA, k + rk, kok, ACC).to(TYPE)  # 0 past the last column
        largest = tl.maximum(largest, tl.max(tl.abs(h.to(tl.float32)), 1))
    return largest / 127


@jit(varying=("M", "T", "P", "N"))
def assemble_norm_project_forward(
    TOKENS,  # [samples, N, K]
    PREFIX,  # [P, K] or None
    SUFFIX,  # [Q, K] or None
    SOURCE,  # [B] int32: where sample b stands in TOKENS, -1 if absent; None: at b
    MASK,  # [K], given with SOURCE
    GAMMA,  # [K] or None: no norm
    BETA,  # [K] or None
    A,  # [R, K] or None
    ROWS,  # [M, K] or None
    H,  # [M, PITCH] or None: K columns of h, then S again and zeros, as `Linear.joined` multiplies them
    Q,  # [M, K] int8 or None: h in steps of its row's scale
    SCALE,  # [M] fp32, given with Q
    S,  # [M, R], given with A
    MEAN,  # [M], given with GAMMA; None: RMSNorm
    RSTD,  # [M], given with GAMMA
    eps,
    M,
    T,
    P,
    N,
    K,
    PITCH,  # K, or K + R and more up to a multiple of 16
    R: tl.constexpr,
    JOINED: tl.constexpr,  # PITCH is more than K
    ALIGNED: tl.constexpr,
    TYPE: tl.constexpr,  # of h
    TINY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Every output is written once, in the sweep over columns that makes the first BR columns of S; further ranks sweep
    over the cached rows again."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    ok = rm < M
    place = rm[:, None].to(tl.int64) * K
    h_at = H
    if H is not None:
        h_at = H + rm[:, None].to(tl.int64) * PITCH
    base = row_address(rm, TOKENS, PREFIX, SUFFIX, SOURCE, MASK, M, T, P, N, K, ALIGNED)
    mean = tl.zeros((BM,), ACC)
    rstd = mean
    if GAMMA is not None:
        if MEAN is not None:
            mean, rstd = row_statistics(base, ok, K, eps, ACC, BM, BK)
            tl.store(MEAN + rm, mean, mask=ok)
        else:
            rstd = row_rstd(base, ok, K, eps, ACC, BM, BK)
        tl.store(RSTD + rm, rstd, mask=ok)
    scale = mean
    if Q is not None:
        scale = row_scale(base, ok, mean, rstd, GAMMA, BETA, K, TYPE, ACC, BM, BK)
        tl.store(SCALE + rm, scale, mask=ok)
    for r in tl.range(0, R, BR, num_stages=1):
        rr = r + tl.arange(0, BR)
        acc = tl.zeros((BM, BR), ACC)
        for k in range(0, K, BK):
            kok = rk < K - k
            mask = ok[:, None] & kok[None, :]
            x = tl.load(base[:, None] + (k + rk)[None, :], mask=mask, other=0.0)
            if r == 0 and ROWS is not None:
                tl.store(ROWS + place + (k + rk)[None, :], x, mask=mask)
            h = normalise(x, mean, rstd, GAMMA, BETA, k + rk, kok, ACC).to(TYPE)
            if r == 0 and H is not None:
                tl.store(h_at + (k + rk)[None, :], h, mask=mask)
            if r == 0 and Q is not None:
                q = round_half_even(h.to(tl.float32) / tl.maximum(scale, TINY)[:, None])
                tl.store(Q + place + (k + rk)[None, :], q.to(tl.int8), mask=mask)
            if A is not None:
                a = tl.load(A + rr[None, :] * K + (k + rk)[:, None], mask=(rr < R)[None, :] & kok[:, None], other=0.0)
                acc = tl.dot(h.to(a.dtype), a, acc, out_dtype=ACC, input_precision=PRECISION)
        if A is not None:
            s_at = S + rm[:, None].to(tl.int64) * R + rr[None, :]
            tl.store(s_at, acc.to(S.dtype.element_ty), mask=ok[:, None] & (rr < R)[None, :])
            if JOINED:  # past the last rank acc is 0
                tl.store(h_at + K + rr[None, :], acc.to(TYPE), mask=ok[:, None] & (rr < PITCH - K)[None, :])


def sources(present: Tensor | None, packed: int) -> Tensor | None:
    """[B] int32: where each sample's tokens stand among `packed` samples, -1 where it has none."""
    if present is None:
        return None
    place = torch.arange(packed, device=present.device) if packed == present.shape[0] else present.cumsum(0) - 1
    return torch.where(present, place, -1).to(torch.int32)


def aligned(width: int, *tensors: Tensor | None) -> bool:
    """Whether every row of every tensor, `width` elements long, starts at a multiple of 16 bytes."""
    return all(t is None or (width * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0) for t in tensors)


def forward_triton(
    tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a, eps, rms, dtype, quantize, pitch=None
):
    """As `forward_aten`, in one launch. pitch: elements from one row of h to the next, S and zeros in between."""
    if rms:
        refuse_bias(norm_bias)
    packed, n, k = tokens.shape
    tokens, norm_weight, norm_bias = backend.contiguous(tokens, norm_weight, norm_bias)
    if present is not None and mask_token is None:
        mask_token = tokens.new_zeros(k)
    learned = [None if t is None else t.to(tokens.dtype).contiguous() for t in (prefix, suffix, mask_token)]
    p, last = (0 if t is None else t.shape[0] for t in learned[:2])
    batch, height = packed if present is None else present.shape[0], p + n + last
    r, wide = 1 if lora_a is None else lora_a.shape[0], backend.wide(tokens.dtype)
    norm, joined = norm_weight is not None, not (prefix is None and suffix is None and present is None)

    def new(wanted, *shape, dtype):
        return tokens.new_empty(shape, dtype=dtype) if wanted else None

    rows = new(joined, batch, height, k, dtype=tokens.dtype)
    written = not quantize and (norm or dtype != tokens.dtype or pitch is not None)
    h = new(written, batch, height, pitch or k, dtype=dtype)
    q = new(quantize, batch, height, k, dtype=torch.int8)
    scale = new(quantize, batch * height, dtype=torch.float32)
    s = new(lora_a is not None, batch, height, r, dtype=dtype)
    mean, rstd = (new(wanted, batch * height, dtype=wide) for wanted in (norm and not rms, norm))
    backend.launch(
        assemble_norm_project_forward,
        (-(-batch * height // FORWARD_TILE["BM"]),),
        TOKENS=tokens,
        PREFIX=learned[0],
        SUFFIX=learned[1],
        SOURCE=sources(present, packed),
        MASK=learned[2],
        GAMMA=norm_weight,
        BETA=norm_bias,
        A=None if lora_a is None else backend.cast(lora_a, dtype).contiguous(),
        ROWS=rows,
        H=h,
        Q=q,
        SCALE=scale,
        S=s,
        MEAN=mean,
        RSTD=rstd,
        eps=eps,
        M=batch * height,
        T=height,
        P=p,
        N=n,
        K=k,
        PITCH=pitch or k,
        R=r,
        JOINED=pitch is not None,
        ALIGNED=aligned(k, tokens, *learned),
        TYPE=element_type(dtype),
        TINY=TINY,
        ACC=accumulator(tokens.dtype),
        PRECISION=dot_precision(tokens.dtype),
        BR=rank_tile(r),
        **FORWARD_TILE,
    )
    return Assembled(rows, h, s, mean, rstd, q, scale)
