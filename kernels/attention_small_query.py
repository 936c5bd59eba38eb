"""The Triton kernels of `attention` for few query rows: one program holds all queries of a (sample, head) pair.

Keys pass by in blocks with a running softmax; hidden keys and values are not read. The backward computes the
probabilities again from the row log-sum-exp, and as no other program has the pair's keys, dK and dV are written once.

q [B, H, Sq, Dh], k and v [B, H, S, Dh] with any strides but the last, which is 1; lse [B * H, Sq]. Where q has more
heads than k and v, the launchers lay those of one key head end to end, as rows of it: few rows, cheap to copy.
"""

from __future__ import annotations

from torch import Tensor

from . import backend
from .backend import jit, tl
from .tiling import accumulator, dot_precision

MOST_ELEMENTS = 64 * 64  # of a pair's queries: 64 rows of 64 columns, 32 of 128; more would spill registers
FORWARD_TILE = {"BN": 64, "num_warps": 4, "num_stages": 2}
BACKWARD_TILE = {"BN": 32, "num_warps": 4, "num_stages": 2}


@jit
def rows_at(X, b, h, rows, columns, stride_b, stride_h, stride_s):
    """Addresses [rows, columns] within a pair (b, h) of X [B, H, S, Dh]."""
    return X + b.to(tl.int64) * stride_b + h * stride_h + rows[:, None].to(tl.int64) * stride_s + columns[None, :]


@jit
def key_is_visible(rn, length, TOKENS, S):
    """The first `length` of TOKENS token rows, and the suffix rows after all of them."""
    return (rn < length) | ((rn >= TOKENS) & (rn < S))


@jit(varying=("H", "SQ", "S", "TOKENS"))
def attention_small_query_forward(
    Q,
    K,
    V,
    LENGTHS,  # [B] or None
    OUT,  # [B, H, Sq, Dh]
    LSE,  # [B * H, Sq] fp32
    scale,
    H,
    SQ,
    S,
    TOKENS,  # S without the suffix rows
    DH,
    Q_B, Q_H, Q_S,
    K_B, K_H, K_S,
    V_B, V_H, V_S,
    OUT_B, OUT_H, OUT_S,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """A row without a visible key gives 0, and its log-sum-exp is stored as 0."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rq, rd = tl.arange(0, BQ), tl.arange(0, BD)
    qok, dok = rq < SQ, rd < DH
    length = TOKENS
    if LENGTHS is not None:
        length = tl.minimum(tl.load(LENGTHS + b), TOKENS).to(tl.int32)
    q_mask = qok[:, None] & dok[None, :]
    q = tl.load(rows_at(Q, b, h, rq, rd, Q_B, Q_H, Q_S), mask=q_mask, other=0.0)
    top = tl.full((BQ,), -1e30, ACC)
    total = tl.zeros((BQ,), ACC)
    acc = tl.zeros((BQ, BD), ACC)
    for n in range(0, S, BN):
        rn = n + tl.arange(0, BN)
        visible = key_is_visible(rn, length, TOKENS, S)
        mask = visible[:, None] & dok[None, :]
        k = tl.load(rows_at(K, b, h, rn, rd, K_B, K_H, K_S), mask=mask, other=0.0)
        v = tl.load(rows_at(V, b, h, rn, rd, V_B, V_H, V_S), mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.where(visible[None, :], tl.exp(scores - new_top[:, None]), 0.0)
        keep = tl.exp(top - new_top)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], out_dtype=ACC, input_precision=PRECISION)
        top = new_top
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out = (acc / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(rows_at(OUT, b, h, rq, rd, OUT_B, OUT_H, OUT_S), out, mask=q_mask)
    lse = tl.where(seen, top + tl.log(total), 0.0)
    tl.store(LSE + tl.program_id(0).to(tl.int64) * SQ + rq, lse, mask=qok)


@jit(varying=("H", "SQ", "S", "TOKENS"))
def attention_small_query_backward(
    D_OUT,
    Q,
    K,
    V,
    LENGTHS,  # [B] or None
    OUT,  # [B, H, Sq, Dh]
    LSE,  # [B * H, Sq] fp32
    D_Q,
    D_K,
    D_V,
    scale,
    H,
    SQ,
    S,
    TOKENS,  # S without the suffix rows
    DH,
    DO_B, DO_H, DO_S,
    Q_B, Q_H, Q_S,
    K_B, K_H, K_S,
    V_B, V_H, V_S,
    OUT_B, OUT_H, OUT_S,  # of OUT and D_Q
    DK_B, DK_H, DK_S,  # of D_K and D_V
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """dS = P (dP - rowsum(dO O)) scale;  dQ = dS K,  dK = dS^T Q,  dV = P^T dO."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    rq, rd = tl.arange(0, BQ), tl.arange(0, BD)
    qok, dok = rq < SQ, rd < DH
    length = TOKENS
    if LENGTHS is not None:
        length = tl.minimum(tl.load(LENGTHS + b), TOKENS).to(tl.int32)
    q_mask = qok[:, None] & dok[None, :]
    q = tl.load(rows_at(Q, b, h, rq, rd, Q_B, Q_H, Q_S), mask=q_mask, other=0.0)
    d_out = tl.load(rows_at(D_OUT, b, h, rq, rd, DO_B, DO_H, DO_S), mask=q_mask, other=0.0)
    out = tl.load(rows_at(OUT, b, h, rq, rd, OUT_B, OUT_H, OUT_S), mask=q_mask, other=0.0)
    delta = tl.sum(d_out.to(ACC) * out.to(ACC), 1)
    lse = tl.load(LSE + tl.program_id(0).to(tl.int64) * SQ + rq, mask=qok, other=0.0)
    dq = tl.zeros((BQ, BD), ACC)
    for n in range(0, S, BN):
        rn = n + tl.arange(0, BN)
        visible = key_is_visible(rn, length, TOKENS, S)
        mask = visible[:, None] & dok[None, :]
        k = tl.load(rows_at(K, b, h, rn, rd, K_B, K_H, K_S), mask=mask, other=0.0)
        v = tl.load(rows_at(V, b, h, rn, rd, V_B, V_H, V_S), mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :] & qok[:, None], scores, -1e30)
        p = tl.exp(scores - lse[:, None])
        dv = tl.dot(tl.trans(p.to(v.dtype)), d_out, out_dtype=ACC, input_precision=PRECISION)
        dp = tl.dot(d_out, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None]) * scale).to(k.dtype)
        dk = tl.dot(tl.trans(ds), q, out_dtype=ACC, input_precision=PRECISION)
        dq = tl.dot(ds, k, dq, out_dtype=ACC, input_precision=PRECISION)
        mask = (rn < S)[:, None] & dok[None, :]
        tl.store(rows_at(D_K, b, h, rn, rd, DK_B, DK_H, DK_S), dk.to(D_K.dtype.element_ty), mask=mask)
        tl.store(rows_at(D_V, b, h, rn, rd, DK_B, DK_H, DK_S), dv.to(D_V.dtype.element_ty), mask=mask)
    tl.store(rows_at(D_Q, b, h, rq, rd, OUT_B, OUT_H, OUT_S), dq.to(D_Q.dtype.element_ty), mask=q_mask)


def rows_first(t: Tensor) -> Tensor:
    """New memory for [B, H, S, Dh], laid out as [B, S, H, Dh]."""
    b, h, s, d = t.shape
    return t.new_empty(b, s, h, d).transpose(1, 2)


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _tile(width: int) -> int:
    """The power of two that holds `width`, at least the 16 that a matrix unit takes."""
    return max(16, 1 << (width - 1).bit_length())


def few_queries(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take q [B, H, Sq, Dh] beside k [B, kv_heads, S, Dh]."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return rows <= 64 and _tile(rows) * _tile(q.shape[3]) <= MOST_ELEMENTS


def _by_key_head(t: Tensor, kv_heads: int) -> Tensor:
    """[B, H, Sq, Dh] -> [B, kv_heads, H // kv_heads * Sq, Dh]."""
    return t if t.shape[1] == kv_heads else t.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _by_query_head(t: Tensor, like: Tensor) -> Tensor:
    """The way back, to the shape of `like`, laid out as [B, Sq, H, Dh]."""
    if t.shape == like.shape:
        return t
    return rows_first(like).copy_(t.unflatten(2, (like.shape[1] // t.shape[1], like.shape[2])).flatten(1, 2))


def _strides(**tensors: Tensor) -> dict[str, int]:
    """{"Q_B": ..., "Q_H": ..., "Q_S": ...} for Q=q, and so on."""
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("BHS")}


def forward_triton(q, k, v, lengths, suffix):
    """out, laid out as [B, Sq, H, Dh], and the row log-sum-exp [B * H, Sq]."""
    given = q
    q, k, v = _unit_stride(_by_key_head(q, k.shape[1]), k, v)
    (b, h, rows, d), keys = q.shape, k.shape[2]
    out, lse = rows_first(q), q.new_empty(b * h, rows, dtype=backend.wide(q.dtype))
    backend.launch(
        attention_small_query_forward,
        (b * h,),
        Q=q,
        K=k,
        V=v,
        LENGTHS=None if lengths is None else lengths.contiguous(),
        OUT=out,
        LSE=lse,
        scale=d**-0.5,
        H=h,
        SQ=rows,
        S=keys,
        TOKENS=keys - suffix,
        DH=d,
        **_strides(Q=q, K=k, V=v, OUT=out),
        ACC=accumulator(q.dtype),
        PRECISION=dot_precision(q.dtype),
        BQ=_tile(rows),
        BD=_tile(d),
        **FORWARD_TILE,
    )
    return _by_query_head(out, given), lse.view(given.shape[0] * given.shape[1], given.shape[2])


def backward_triton(d_out, q, k, v, lengths, out, lse, suffix):
    """dq, dk, dv, laid out as [B, S, H, Dh]."""
    given, kv_heads = q, k.shape[1]
    d_out, q, out = (_by_key_head(t, kv_heads) for t in (d_out, q, out))
    d_out, q, k, v = _unit_stride(d_out, q, k, v)
    (b, h, rows, d), keys = q.shape, k.shape[2]
    dq, dk, dv = rows_first(q), rows_first(k), rows_first(v)
    out = out if out.stride() == dq.stride() else rows_first(out).copy_(out)
    tile = BACKWARD_TILE | ({"num_stages": 1} if _tile(rows) == 64 else {})  # no registers left to read ahead
    backend.launch(
        attention_small_query_backward,
        (b * h,),
        D_OUT=d_out,
        Q=q,
        K=k,
        V=v,
        LENGTHS=None if lengths is None else lengths.contiguous(),
        OUT=out,
        LSE=lse,
        D_Q=dq,
        D_K=dk,
        D_V=dv,
        scale=d**-0.5,
        H=h,
        SQ=rows,
        S=keys,
        TOKENS=keys - suffix,
        DH=d,
        **_strides(DO=d_out, Q=q, K=k, V=v, OUT=out, DK=dk),
        ACC=accumulator(q.dtype),
        PRECISION=dot_precision(q.dtype),
        BQ=_tile(rows),
        BD=_tile(d),
        **tile,
    )
    return _by_query_head(dq, given), dk, dv
