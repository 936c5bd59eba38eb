"""The backward of linear_lowrank and lora_linear in three passes: G and dB, dX, dA.

    G = s dY B            dX = dY W + mask (G A)            dA = G^T (mask x)            dB = s dY^T S

dY [M, N], W [N, K] (floating, or int8 with scales [N]), A [groups * r, K], B [N, r], x [M, K], S and G [M, groups * r];
G is the gradient of S; blocks of B as in linear_lowrank.py. One pass over dY makes G and dB together. The scales of an
int8 W lie along the summed dimension of dX, so the tile of W is scaled. A GEMM starts from the low-rank product, which
alone is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, products
from .backend import cast, jit, tl
from .chunks import flat
from .dropout import kept, kept_tile, threshold
from .quantize import dequantize_rows_aten
from .reduce import launch_reduce_rows, launch_sum_parts, splits
from .tiling import accumulator, dot_precision, gemm_tile, group_of, rank_tile, tile_index

# Ranks up to here take less time in one product with all groups, most of it in vain, than in one for each: below fp32,
# at 3,152 rows of width 768 on a CPU; in fp32 dY B alone, without AVX-512, from that many rows on.
MOST_SKINNY = 16
NARROW, FEW = 8, 64
LOW = 32  # ranks from here on take less time in dY^T S itself than in its transpose
LOW_RANK_TILE = {"BM": 64, "num_warps": 8, "num_stages": 3}


# -------------------------------------------------------------------------------------------------------------- Triton
@jit(varying=("M", "SPLIT"))
def lora_linear_backward_low_rank(
    DY,  # [M, N], N = (GROUPS + LEAD - 1) * WIDTH
    S,  # [M, GROUPS * R] or None: no dB then
    B,  # [N, R]
    G_PARTS,  # [column tiles of the widest group, M, GROUPS * R] fp32
    DB_PARTS,  # [SPLIT, N, R] fp32, or None
    M,
    WIDTH,
    SPLIT,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Parts of dY B and of dY^T S from one reading of dY: a program owns BN columns, BR ranks and a range of rows."""
    BLOCKS: tl.constexpr = GROUPS + LEAD - 1
    tiles = tl.cdiv(WIDTH, BN)
    block, part, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    group = group_of(block, LEAD)
    column = part * BN + tl.arange(0, BN)
    nok = column < WIDTH
    rn = block * WIDTH + column
    if LEAD > 1:
        part += tl.where(group == 0, block * tiles, 0)
    rr = tl.program_id(2) * BR + tl.arange(0, BR)
    rok = rr < R
    rm = tl.arange(0, BM)
    b = tl.load(B + rn[:, None] * R + rr[None, :], mask=nok[:, None] & rok[None, :], other=0.0)
    b = b.to(DY.dtype.element_ty)
    db = tl.zeros((BN, BR), ACC)
    rows = tl.cdiv(tl.cdiv(M, BM), SPLIT) * BM
    for m in range(split * rows, min((split + 1) * rows, M), BM):
        row = (m + rm).to(tl.int64)
        mok = m + rm < M
        dy_at = DY + row[:, None] * (BLOCKS * WIDTH) + rn[None, :]
        dy = tl.load(dy_at, mask=mok[:, None] & nok[None, :], other=0.0)
        low = row[:, None] * (GROUPS * R) + group * R + rr[None, :]
        mask = mok[:, None] & rok[None, :]
        g = tl.dot(dy, b, out_dtype=ACC, input_precision=PRECISION)
        tl.store(G_PARTS + part.to(tl.int64) * M * (GROUPS * R) + low, g, mask=mask)
        if S is not None:
            s = tl.load(S + low, mask=mask, other=0.0)
            db = tl.dot(tl.trans(dy), s, db, out_dtype=ACC, input_precision=PRECISION)
    if S is not None:
        db_at = DB_PARTS + split.to(tl.int64) * (BLOCKS * WIDTH * R) + rn[:, None] * R + rr[None, :]
        tl.store(db_at, db, mask=nok[:, None] & rok[None, :])


@jit(varying=("M", "dropped_below", "scale"))
def lora_linear_backward_input(
    DY,  # [M, N]
    W,  # [N, K], int8 if WS is given
    WS,  # [N] fp32 or None
    G,  # [M, R] or None; here R counts the ranks of all groups
    A,  # [R, K]
    SEED,  # [] int64 or None
    DX,  # [M, K]
    dropped_below,
    scale,  # 1 / (1 - p)
    M,
    N,
    K,
    R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BK divides N
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """dX = dY W + mask (G A). Rows past the end read the first ones and are not stored."""
    pm, pk = tile_index(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BN))
    rm = pm * BM + tl.arange(0, BM)
    row = rm[:, None].to(tl.int64)
    rk = pk * BN + tl.arange(0, BN)  # columns of dX
    rn = tl.arange(0, BK)  # the summed dimension
    mok = rm < M
    kok = rk < K
    acc = tl.zeros((BM, BN), ACC)
    if G is not None:
        for r in tl.range(0, R, BR, num_stages=1):
            rr = r + tl.arange(0, BR)
            g = tl.load(G + row * R + rr[None, :], mask=mok[:, None] & (rr < R)[None, :], other=0.0)
            a = tl.load(A + rr[:, None] * K + rk[None, :], mask=(rr < R)[:, None] & kok[None, :], other=0.0)
            acc = tl.dot(g, a.to(g.dtype), acc, out_dtype=ACC, input_precision=PRECISION)
        if SEED is not None:
            acc = tl.where(kept_tile(SEED, rm, rk, dropped_below), acc * scale, 0.0)
    dy_at = DY + (rm % M)[:, None].to(tl.int64) * N + rn[None, :]
    w_at = W + rn[:, None] * K + rk[None, :]
    for n in range(0, N, BK):
        nok = (rn < N - n) | EVEN
        dy = tl.load(dy_at, mask=nok[None, :], other=0.0)
        w = tl.load(w_at, mask=nok[:, None] & kok[None, :], other=0)
        if WS is not None:
            w = w.to(ACC) * tl.load(WS + n + rn, mask=nok, other=0.0)[:, None]
        acc = tl.dot(dy, w.to(dy.dtype), acc, out_dtype=ACC, input_precision=PRECISION)
        dy_at += BK
        w_at += BK * K
    tl.store(DX + row * K + rk[None, :], acc.to(DX.dtype.element_ty), mask=mok[:, None] & kok[None, :])


def launch_low_rank(dy, s, lora_b, scaling, groups, lead):
    """(G [M, groups * r], dB [N, r] or None): dy [M, N], s [M, groups * r] or None, lora_b [N, r]."""
    (m, n), r = dy.shape, lora_b.shape[1]
    block, split = rank_tile(r), splits(m, 2 * r)
    columns = 256 if block == 16 else 128
    blocks = groups + lead - 1
    tiles = -(-n // blocks // columns)
    new = dy.new_empty if lead == 1 else dy.new_zeros  # the narrower groups have fewer parts
    g_parts = new(lead * tiles, m, groups * r, dtype=backend.wide(dy.dtype))
    db_parts = None if s is None else g_parts.new_empty(split, n, r)
    backend.launch(
        lora_linear_backward_low_rank,
        (blocks * tiles, split, -(-r // block)),
        DY=dy,
        S=s,
        B=lora_b,
        G_PARTS=g_parts,
        DB_PARTS=db_parts,
        M=m,
        WIDTH=n // blocks,
        SPLIT=split,
        R=r,
        GROUPS=groups,
        LEAD=lead,
        ACC=accumulator(dy.dtype),
        PRECISION=dot_precision(dy.dtype),
        BN=columns,
        BR=block,
        **LOW_RANK_TILE,
    )
    return launch_sum_parts(g_parts, scaling, dy.dtype, db_parts, lora_b.dtype)


def launch_input(dy, weight, weight_scale, g, lora_a, dropout, seed):
    """dX [M, K]: dy [M, N], weight [N, K]; g [M, groups * r] and lora_a [groups * r, K], or neither."""
    (m, n), k, tile = dy.shape, weight.shape[1], gemm_tile(dy.dtype)
    r = 0 if lora_a is None else lora_a.shape[0]
    dx = dy.new_empty(m, k)
    backend.launch(
        lora_linear_backward_input,
        (-(-m // tile["BM"]) * -(-k // tile["BN"]),),
        DY=dy,
        W=weight,
        WS=weight_scale,
        G=g if r else None,
        A=lora_a,
        SEED=seed,
        DX=dx,
        dropped_below=threshold(dropout),
        scale=1 / (1 - dropout),
        M=m,
        N=n,
        K=k,
        R=r,
        ACC=accumulator(dy.dtype),
        PRECISION=dot_precision(dy.dtype),
        EVEN=n % tile["BK"] == 0,
        BR=min(32, rank_tile(r)),
        **tile,
    )
    return dx


def linear_backward_triton(
    dy, x, weight, weight_scale, s, lora_a, lora_b, scaling, groups, lead, dropout, seed, wants_ds
):
    """As `linear_backward_aten`."""
    rows = flat(dy).contiguous()
    x, weight, weight_scale, s = backend.contiguous(flat(x), weight, weight_scale, flat(s))
    lora_a, lora_b = backend.contiguous(lora_a, lora_b)
    dx = g = da = db = None
    if lora_b is not None:
        g, db = launch_low_rank(rows, s, lora_b, scaling, groups, lead)
    if weight is not None and weight_scale is None and seed is None:
        # The library's GEMM and a second pass over dX for G A: on an H200 40 us where one GEMM of ours takes 56.
        dx = rows @ as_float(weight, None, dy.dtype)
        if lora_a is not None:
            dx.addmm_(g, cast(lora_a, g.dtype))
    elif weight is not None:
        dx = launch_input(rows, weight, weight_scale, None if lora_a is None else g, lora_a, dropout, seed)
    if x is not None:
        da = launch_reduce_rows(g, x, lora_a.dtype, dropout, seed)
    return _like_rows(dy, dx), _like_rows(dy, g) if wants_ds else None, da, db


# ---------------------------------------------------------------------------------------------------------------- ATen
def as_float(weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return cast(weight, dtype) if weight_scale is None else dequantize_rows_aten(weight, weight_scale, dtype)


def linear_backward_aten(
    dy, x, weight, weight_scale, s, lora_a, lora_b, scaling, groups, lead, dropout, seed, wants_ds
):
    """dX [..., K], dS = G [..., groups * r], dA, dB; None where its operand (weight, wants_ds, x, s) is not given."""
    rows, dx, g, da, db, mask = flat(dy), None, None, None, None, None
    if lora_b is not None:
        wants_g = wants_ds or lora_a is not None
        g, db = low_rank_backward(rows, None if s is None else flat(s), lora_b, scaling, groups, lead, wants_g)
        g = g.mul_(scaling) if wants_g else None
    if lora_a is not None and seed is not None:
        mask = kept(rows.shape[0], lora_a.shape[1], dropout, seed)
    if weight is not None and lora_a is None:
        dx = products.through(rows, as_float(weight, weight_scale, dy.dtype))
    elif weight is not None:
        dx, a = products.through(rows, as_float(weight, weight_scale, dy.dtype)), cast(lora_a, dy.dtype)
        if mask is None:  # the narrow product second: adding up rows in the wide one takes 2 to 5% of its time
            products.addmm_(dx, g, a)
        else:
            dx.add_(products.mm(g, a).mul_(1 / (1 - dropout)).mul_(mask))
    if x is not None:
        x = flat(x)
        da = cast(products.mm(g.t(), x if mask is None else torch.where(mask, x, 0)), lora_a.dtype)
        if mask is not None:
            da.mul_(1 / (1 - dropout))
    return _like_rows(dy, dx), _like_rows(dy, g) if wants_ds else None, da, db


def low_rank_backward(dy, s, lora_b, scaling, groups, lead, wants_g=True):
    """G = dY B [M, groups * r] and dB = scaling dY^T S [N, r], block by block; None: not wanted, or no S given.

    dB of a low rank is made as the transpose of S^T dY, which takes a quarter to two thirds of the time on a CPU.
    """
    if groups > 1 and lead > 1:
        return _lead_and_others(dy, s, lora_b, scaling, groups, lead, wants_g)
    b, g, db = cast(lora_b, dy.dtype), None, None
    if groups == 1:
        g = products.mm(dy, b) if wants_g else None
        if s is not None and b.shape[1] < LOW:  # b is not read
            db = products.addmm(b.t(), s.t(), dy, beta=0, alpha=scaling).t().contiguous()
        elif s is not None:
            db = products.addmm(b, dy.t(), s, beta=0, alpha=scaling)
    elif b.shape[1] <= MOST_SKINNY and dy.dtype.itemsize < 4:
        if wants_g:
            g = products.mm(dy, torch.block_diag(*b.chunk(groups)))
        if s is not None:
            db = of_own_group(products.mm(s.t(), dy).t(), groups, lead, dy.dtype).mul_(scaling)
    else:
        (n, r), m = b.shape, dy.shape[0]
        parts, each = dy.view(m, groups, n // groups).transpose(0, 1), b.view(groups, n // groups, r)
        if wants_g and r <= NARROW and m >= FEW:
            g = products.mm(dy, torch.block_diag(*each))
        elif wants_g:
            g = products.bmm(parts, each).transpose(0, 1).flatten(1)
        if s is not None:
            low = s.view(m, groups, r).permute(1, 2, 0)  # [groups, r, M]
            # b is not read; of beta = 0 and alpha = 0 ATen leaves memory as it is, in bf16 and fp16
            none, beta = (each.transpose(1, 2), 0) if scaling else (b.new_zeros(()), 1)
            db = products.baddbmm(none, low, parts, beta=beta, alpha=scaling)
            db = db.transpose(1, 2).reshape(lora_b.shape)
    return g, None if db is None else cast(db, lora_b.dtype)


def _lead_and_others(dy, s, lora_b, scaling, groups, lead, wants_g):
    """`low_rank_backward` of the first group, and of the others, which are alike."""
    (width, *_), r = group_widths(dy.shape[1], groups, lead), lora_b.shape[1]
    low = (None, None) if s is None else (s[:, :r], s[:, r:])
    each = (dy[:, :width], low[0], lora_b[:width], 1), (dy[:, width:], low[1], lora_b[width:], groups - 1)
    (g, db), (g_of_others, db_of_others) = (low_rank_backward(*own[:3], scaling, own[3], 1, wants_g) for own in each)
    return torch.cat((g, g_of_others), 1) if wants_g else None, None if s is None else torch.cat((db, db_of_others))


def group_widths(n: int, groups: int, lead: int) -> list[int]:
    """Columns of each group: the first is `lead` times as wide as each other."""
    width = n // (groups + lead - 1)
    return [lead * width] + [width] * (groups - 1)


def of_own_group(products: Tensor, groups: int, lead: int, dtype: torch.dtype) -> Tensor:
    """[N, groups * r] -> [N, r]: of each row the columns of its group."""
    r, width = products.shape[1] // groups, len(products) // (groups + lead - 1)
    more = (lead - 1) * width  # rows of the first group before its last block, from where on all groups are alike
    last = products[more:].view(groups, width, groups, r)
    own = last.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, width, r]
    own = own.to(dtype, memory_format=torch.contiguous_format).reshape(groups * width, r)  # in one pass
    return torch.cat([cast(products[:more, :r], dtype), own]) if more else own


def a_grad(g: Tensor, h: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """dA = scaling G^T h, [groups * r, K] in the dtype of lora_a, which is not read: only its shape counts."""
    return cast(products.addmm(cast(lora_a, g.dtype), g.t(), h, beta=0, alpha=scaling), lora_a.dtype)


# -------------------------------------------------------------------------------------------------------- registration
def _like_rows(dy: Tensor, t: Tensor | None) -> Tensor | None:
    """[M, C] -> [..., C] with the leading dimensions of dy."""
    return t if t is None or dy.dim() == 2 else t.view(*dy.shape[:-1], t.shape[1])


def _fake(dy, x, weight, weight_scale, s, lora_a, lora_b, scaling, groups, lead, dropout, seed, wants_ds):
    rows = dy.shape[:-1]
    return (
        None if weight is None else dy.new_empty(*rows, weight.shape[1]),
        dy.new_empty(*rows, groups * lora_b.shape[1]) if wants_ds else None,
        None if x is None else lora_a.new_empty(lora_a.shape),
        None if s is None else lora_b.new_empty(lora_b.shape),
    )


linear_backward = backend.Op(
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? weight_scale, Tensor? s, Tensor? lora_a, "
    "Tensor? lora_b, float scaling, int groups, int lead, float dropout, Tensor? seed, bool wants_ds) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    aten=linear_backward_aten,
    triton=linear_backward_triton,
    fake=_fake,
)


# ------------------------------------------------------------------------------------------------ of both Functions
def save(ctx, x, weight, bias, weight_scale, s, lora_a, lora_b, seed):
    """Keep the operands of the gradients that will be asked for and no others: x for dA and dW alone, S for dB."""
    need_x, need_w, need_bias, need_low, need_b = ctx.needs_input_grad[:5]  # "low": A, or S where S is an input
    ctx.s_is_input = lora_a is None and lora_b is not None
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype if need_bias else None
    need_g = lora_b is not None and (need_low or (need_x and lora_a is not None))
    ctx.save_for_backward(
        x if need_w or (need_low and lora_a is not None) else None,
        weight if need_x else None,
        weight_scale if need_x else None,
        s if need_b else None,
        lora_a if need_g else None,
        lora_b if need_g or need_b else None,
        seed,
    )


def gradients(ctx, dy):
    """(dX, dW, db, dA or dS, dB), None for those nobody asked for."""
    if dy is None:
        return (None,) * 5
    x, weight, weight_scale, s, lora_a, lora_b, seed = ctx.saved_tensors
    need_x, need_w, need_bias, need_low, need_b = ctx.needs_input_grad[:5]
    dx = dweight = dbias = dlow = db = None
    if need_x or need_low or need_b:
        x_for_da = x if need_low and lora_a is not None else None
        operands = (dy, x_for_da, weight, weight_scale, s, lora_a, lora_b)
        options = ctx.scaling, ctx.groups, ctx.lead, ctx.dropout, seed, need_low and ctx.s_is_input
        dx, ds, da, db = linear_backward(*operands, *options)
        dlow = ds if ctx.s_is_input else da
    if need_w:
        dweight = products.mm(flat(dy).t(), flat(x)).to(ctx.weight_dtype)
    if need_bias:
        dbias = flat(dy).sum(0, dtype=ctx.bias_dtype)
    return dx if need_x else None, dweight, dbias, dlow if need_low else None, db if need_b else None
