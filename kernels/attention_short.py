"""The Triton kernels of attention over short samples laid end to end, for attention_rows.py: a launch each way.

    out = softmax(q k^T / sqrt(Dh)) v, sample by sample          q [Nq, H * Dh], k and v [N, kv_heads * Dh]
    dS = P (dP - rowsum(dO O));  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO          P = softmax, dP = dO V^T

A program has BLOCK rows of one head of one sample. In the backward half of them have keys and half have queries, and
each computes the probabilities anew, from lse [Nq, H]: nothing is added up in memory, and the gradients are written
where those of q, k and v lie side by side. Queries are a sample's last rows; a query sees at most `left` keys before it
and `right` after it, -1 for all. Library functions take three launches and a copy for the backward: on an H100 66 us
for 32 texts of 9 to 129 rows and 12 heads, and 17 for the forward. This took 30 and 12 when one program had both halves
of the backward, 64 rows at a time; as it stands it was not timed.
"""

from __future__ import annotations

from torch import Tensor

from . import backend
from .attention_varlen import EVERYWHERE, Ends
from .backend import jit, tl
from .tiling import accumulator, dot_precision

MOST_KEYS = 256  # of a sample: beyond them a program would pass over what it has once too often
MOST_WIDTH = 64  # of a head: a wider one spills registers
BLOCK = 64  # rows of a program
FORWARD_TILE = {"BLOCK": BLOCK, "STEP": 64, "num_warps": 4, "num_stages": 1}
BACKWARD_TILE = {"BLOCK": BLOCK, "STEP": 32, "num_warps": 4, "num_stages": 1}  # 64 rows at a time would spill registers


@jit
def rows_of(X, start, rows, columns, stride):
    """Addresses [rows, columns] in the rows that begin at `start`."""
    return X + (start + rows)[:, None].to(tl.int64) * stride + columns[None, :]


@jit
def sees(at, key, keys, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether queries at `at` among the keys see each `key`; all broadcast."""
    visible = key < keys
    if LEFT >= 0:
        visible = visible & (key >= at - LEFT)
    if RIGHT >= 0:
        visible = visible & (key <= at + RIGHT)
    return visible


@jit
def sample_at(Q_ENDS, K_ENDS, sample):
    """Where a sample's rows of q and of k begin, and how many they are."""
    q_start, k_start = tl.load(Q_ENDS + sample), tl.load(K_ENDS + sample)
    return q_start, k_start, tl.load(Q_ENDS + sample + 1) - q_start, tl.load(K_ENDS + sample + 1) - k_start


@jit
def of_keys(K, V, start, rk, keys, kv_head, DH: tl.constexpr, STRIDE_K, STRIDE_V, rd):
    """k and v of rows rk of one head; zeros past the last of them."""
    columns, mask = kv_head * DH + rd, (rk < keys)[:, None] & (rd < DH)[None, :]
    k = tl.load(rows_of(K, start, rk, columns, STRIDE_K), mask=mask, other=0.0)
    return k, tl.load(rows_of(V, start, rk, columns, STRIDE_V), mask=mask, other=0.0)


@jit
def of_queries(D_OUT, Q, OUT, LSE, start, rq, queries, head, H, DH: tl.constexpr, STRIDE_Q, ACC: tl.constexpr, rd):
    """q, dO, rowsum(dO O) and lse of rows rq of one head; zeros past the last of them."""
    of_q, qok = head * DH + rd, rq < queries
    mask = qok[:, None] & (rd < DH)[None, :]
    q = tl.load(rows_of(Q, start, rq, of_q, STRIDE_Q), mask=mask, other=0.0)
    d_out = tl.load(rows_of(D_OUT, start, rq, of_q, H * DH), mask=mask, other=0.0)
    out = tl.load(rows_of(OUT, start, rq, of_q, H * DH), mask=mask, other=0.0)
    lse = tl.load(LSE + (start + rq).to(tl.int64) * H + head, mask=qok, other=0.0)
    return q, d_out, tl.sum(d_out.to(ACC) * out.to(ACC), 1), lse


@jit(varying=("H", "Q_ENDS", "K_ENDS"))  # the ends of keys lie anywhere behind those of queries
def attention_short_forward(
    Q,  # [Nq, H * Dh], as K and V with rows STRIDE_.. apart
    K,
    V,
    Q_ENDS,  # [samples + 1]
    K_ENDS,
    OUT,  # [Nq, H * Dh]
    LSE,  # [Nq, H] fp32
    scale,
    H,
    SHARE: tl.constexpr,  # heads of q for each of k and v
    DH: tl.constexpr,
    STRIDE_Q,
    STRIDE_K,
    STRIDE_V,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # rows of the other side at a time
):
    """A program past the end of its sample does nothing."""
    head = tl.program_id(1)
    q_start, k_start, queries, keys = sample_at(Q_ENDS, K_ENDS, tl.program_id(2))
    rq, rd = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BD)
    if tl.program_id(0) * BLOCK < queries:
        of_q, q_mask, at = head * DH + rd, (rq < queries)[:, None] & (rd < DH)[None, :], rq + (keys - queries)
        q = tl.load(rows_of(Q, q_start, rq, of_q, STRIDE_Q), mask=q_mask, other=0.0)
        top, total = tl.full((BLOCK,), -1e30, ACC), tl.zeros((BLOCK,), ACC)
        acc = tl.zeros((BLOCK, BD), ACC)
        for n in range(0, keys, STEP):
            rk = n + tl.arange(0, STEP)
            k, v = of_keys(K, V, k_start, rk, keys, head // SHARE, DH, STRIDE_K, STRIDE_V, rd)
            visible = sees(at[:, None], rk[None, :], keys, LEFT, RIGHT)
            scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION) * scale
            new_top = tl.maximum(top, tl.max(tl.where(visible, scores, -1e30), 1))
            p = tl.exp(tl.where(visible, scores - new_top[:, None], -1e30))
            keep = tl.exp(top - new_top)
            total = total * keep + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], out_dtype=ACC, input_precision=PRECISION)
            top = new_top
        total = tl.where(total > 0, total, 1.0)
        out = (acc / total[:, None]).to(OUT.dtype.element_ty)
        tl.store(rows_of(OUT, q_start, rq, of_q, H * DH), out, mask=q_mask)
        lse_at = LSE + (q_start + rq).to(tl.int64) * H + head
        tl.store(lse_at, top + tl.log(total), mask=rq < queries)


@jit(varying=("KV_HEADS", "Q_ENDS", "K_ENDS"))
def attention_short_backward(
    D_OUT,  # [Nq, H * Dh], as OUT
    Q,  # as K and V with rows STRIDE_.. apart
    K,
    V,
    Q_ENDS,  # [samples + 1]
    K_ENDS,
    OUT,
    LSE,  # [Nq, H] fp32
    D_Q,  # laid out as Q, K and V
    D_K,
    D_V,
    scale,
    KV_HEADS,
    SHARE: tl.constexpr,  # heads of q for each of k and v
    DH: tl.constexpr,
    STRIDE_Q,
    STRIDE_K,
    STRIDE_V,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # rows of the other side at a time
):
    """Programs of keys have [BLOCK keys, STEP queries] at a time, those of queries, the odd ones, its transpose."""
    kv_head, first, H = tl.program_id(1), tl.program_id(0) // 2 * BLOCK, KV_HEADS * SHARE
    q_start, k_start, queries, keys = sample_at(Q_ENDS, K_ENDS, tl.program_id(2))
    own, rd, before = first + tl.arange(0, BLOCK), tl.arange(0, BD), keys - queries
    dok = (rd < DH)[None, :]
    if tl.program_id(0) % 2 == 0 and first < keys:
        of_kv, mask = kv_head * DH + rd, (own < keys)[:, None] & dok
        k, v = of_keys(K, V, k_start, own, keys, kv_head, DH, STRIDE_K, STRIDE_V, rd)
        dk, dv = tl.zeros((BLOCK, BD), ACC), tl.zeros((BLOCK, BD), ACC)
        for turn in range(SHARE * tl.cdiv(queries, STEP)):
            head, rq = kv_head * SHARE + turn % SHARE, turn // SHARE * STEP + tl.arange(0, STEP)
            q, d_out, delta, lse = of_queries(D_OUT, Q, OUT, LSE, q_start, rq, queries, head, H, DH, STRIDE_Q, ACC, rd)
            visible = sees((rq + before)[None, :], own[:, None], keys, LEFT, RIGHT) & (rq < queries)[None, :]
            scores = tl.dot(k, tl.trans(q), out_dtype=ACC, input_precision=PRECISION) * scale
            p = tl.exp(tl.where(visible, scores - lse[None, :], -1e30))
            dv = tl.dot(p.to(d_out.dtype), d_out, dv, out_dtype=ACC, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(d_out), out_dtype=ACC, input_precision=PRECISION)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, out_dtype=ACC, input_precision=PRECISION)
        tl.store(rows_of(D_K, k_start, own, of_kv, STRIDE_K), (dk * scale).to(D_K.dtype.element_ty), mask=mask)
        tl.store(rows_of(D_V, k_start, own, of_kv, STRIDE_V), dv.to(D_V.dtype.element_ty), mask=mask)
    if tl.program_id(0) % 2 == 1 and first < queries:
        for head in range(kv_head * SHARE, (kv_head + 1) * SHARE):
            q, d_out, delta, lse = of_queries(D_OUT, Q, OUT, LSE, q_start, own, queries, head, H, DH, STRIDE_Q, ACC, rd)
            dq = tl.zeros((BLOCK, BD), ACC)
            for n in range(0, keys, STEP):
                rk = n + tl.arange(0, STEP)
                k, v = of_keys(K, V, k_start, rk, keys, kv_head, DH, STRIDE_K, STRIDE_V, rd)
                visible = sees((own + before)[:, None], rk[None, :], keys, LEFT, RIGHT)
                scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION) * scale
                p = tl.exp(tl.where(visible, scores - lse[:, None], -1e30))
                dp = tl.dot(d_out, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
                ds = (p * (dp - delta[:, None])).to(k.dtype)
                dq = tl.dot(ds, k, dq, out_dtype=ACC, input_precision=PRECISION)
            d_q_at = rows_of(D_Q, q_start, own, head * DH + rd, STRIDE_Q)
            tl.store(d_q_at, (dq * scale).to(D_Q.dtype.element_ty), mask=(own < queries)[:, None] & dok)


def fits_short(q: Tensor, width: int, ends: Ends) -> bool:
    """Whether the kernels take samples that end there, of heads of `width`."""
    return ends.most_keys <= MOST_KEYS and width <= MOST_WIDTH and backend.resolve(q) == "triton"


def _tiles(q: Tensor, width: int) -> dict:
    width = max(16, 1 << (width - 1).bit_length())
    return {"ACC": accumulator(q.dtype), "PRECISION": dot_precision(q.dtype), "BD": width}


def short_forward(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, ends: Ends, sides=EVERYWHERE):
    """out [Nq, H * Dh] and the log-sum-exp [Nq, H]; columns of q, k and v are one element apart."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], heads, dtype=backend.wide(q.dtype))
    width = q.shape[1] // heads
    backend.launch(
        attention_short_forward,
        (-(-ends.most_queries // BLOCK), heads, len(ends.keys) - 1),
        Q=q,
        K=k,
        V=v,
        Q_ENDS=ends.queries,
        K_ENDS=ends.keys,
        OUT=out,
        LSE=lse,
        scale=width**-0.5,
        H=heads,
        SHARE=heads // kv_heads,
        DH=width,
        STRIDE_Q=q.stride(0),
        STRIDE_K=k.stride(0),
        STRIDE_V=v.stride(0),
        LEFT=sides[0],
        RIGHT=sides[1],
        **_tiles(q, width),
        **FORWARD_TILE,
    )
    return out, lse


def short_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor,
    heads: int, kv_heads: int, ends: Ends, sides=EVERYWHERE,
) -> None:  # fmt: skip
    """Write d_q, d_k and d_v, laid out as q, k and v are; d_out [Nq, H * Dh] as out."""
    width = q.shape[1] // heads
    backend.launch(
        attention_short_backward,
        (2 * -(-max(ends.most_queries, ends.most_keys) // BLOCK), kv_heads, len(ends.keys) - 1),
        D_OUT=d_out.contiguous(),
        Q=q,
        K=k,
        V=v,
        Q_ENDS=ends.queries,
        K_ENDS=ends.keys,
        OUT=out,
        LSE=lse,
        D_Q=d_q,
        D_K=d_k,
        D_V=d_v,
        scale=width**-0.5,
        KV_HEADS=kv_heads,
        SHARE=heads // kv_heads,
        DH=width,
        STRIDE_Q=q.stride(0),
        STRIDE_K=k.stride(0),
        STRIDE_V=v.stride(0),
        LEFT=sides[0],
        RIGHT=sides[1],
        **_tiles(q, width),
        **BACKWARD_TILE,
    )
