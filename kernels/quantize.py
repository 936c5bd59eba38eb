"""Row-wise absmax int8: w ~= q * scale, scale = absmax(row) / 127 (bitsandbytes' SCB / 127), q [N, K] int8, scale [N].

Both ops are for frozen weights: nothing they return carries a gradient. Rows of activations are quantised in the same
way, where they are written (`assemble_norm_project(quantize=True)`) or where they are multiplied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .backend import jit, tl
from .chunks import chunk_buffer, row_chunks

TINY = 1e-30  # divides an all-zero row without a NaN
QUANTIZE_TILE = {"BN": 8, "BK": 512, "num_warps": 4}


class QuantizedRows(NamedTuple):
    """Rows of activations on their way into an int8 product: h ~= q * scale, one scale a row.

    `like` [..., K] stands for h where only its shape, its dtype and its gradient matter: one zero, expanded.

    >>> QuantizedRows(torch.zeros(1, 2), torch.tensor([[1, 127]], dtype=torch.int8), torch.tensor([0.5])).q.shape
    torch.Size([1, 2])
    """

    like: Tensor
    q: Tensor  # [..., K] int8
    scale: Tensor  # [M] fp32, M all leading dimensions


def quantize_rows_reference(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] -> q [N, K] int8, scale [N] fp32."""
    scale = w.float().abs().amax(1) / 127
    return (w.float() / scale.clamp_min(TINY)[:, None]).round().to(torch.int8), scale


def dequantize_rows_reference(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [N, K] int8, scale [N] -> [N, K] in `dtype`, rounded once."""
    return (q * scale.to(backend.wide(dtype))[:, None]).to(dtype)


def absmax(w: Tensor) -> Tensor:
    """Largest magnitude of each row of w [N, K]; without their sign, floats have the order of their bits."""
    bits, magnitude = (torch.int16, 0x7FFF) if w.element_size() == 2 else (torch.int32, 0x7FFFFFFF)
    return (w.view(bits) & magnitude).amax(1).view(w.dtype)


def quantize_rows_aten(w: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_rows_reference`, bit for bit."""
    q = torch.empty_like(w, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = w.new_empty(len(w), dtype=torch.float32)
    chunks = row_chunks(w)
    buffer = chunk_buffer(w, chunks, torch.float32)
    for s in chunks:
        rows = w[s]
        scale[s] = absmax(rows if w.dtype.itemsize in (2, 4) else rows.float()).float() / 127
        q[s] = buffer[: len(rows)].copy_(rows).div_(scale[s, None].clamp_min(TINY)).round_()
    return q, scale


def dequantize_rows_aten(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dequantize_rows_reference`, bit for bit."""
    wide = backend.wide(dtype)
    w, scale = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format), scale.to(wide)
    for s in row_chunks(q):
        w[s] = q[s].to(wide).mul_(scale[s, None])
    return w


@jit
def round_half_even(x):
    """x, fp32 within +-2**22, to the nearest integer."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left has no fraction


@jit(varying=("N",))
def quantize_rows_kernel(
    W,  # [N, K]
    Q,  # [N, K] int8
    SCALE,  # [N] fp32
    N,
    K,
    TINY: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A sweep for the largest magnitude of BN rows, and a second one, from cache, that rounds half to even."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    nok = rn < N
    at = rn[:, None].to(tl.int64) * K + rk[None, :]
    largest = tl.zeros((BN,), tl.float32)
    for k in range(0, K, BK):
        w = tl.load(W + at + k, mask=nok[:, None] & (rk < K - k)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(w), 1))
    scale = largest / 127
    tl.store(SCALE + rn, scale, mask=nok)
    for k in range(0, K, BK):
        mask = nok[:, None] & (rk < K - k)[None, :]
        w = tl.load(W + at + k, mask=mask, other=0.0).to(tl.float32) / tl.maximum(scale, TINY)[:, None]
        tl.store(Q + at + k, round_half_even(w).to(tl.int8), mask=mask)


def launch_quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] -> q [N, K] int8, scale [N] fp32"""
    (n, k), tile = w.shape, QUANTIZE_TILE
    q, scale = torch.empty((n, k), dtype=torch.int8, device=w.device), w.new_empty(n, dtype=torch.float32)
    backend.launch(
        quantize_rows_kernel,
        (-(-n // tile["BN"]),),
        W=w.contiguous(),
        Q=q,
        SCALE=scale,
        N=n,
        K=k,
        TINY=TINY,
        **tile,
    )
    return q, scale


_quantize_rows = backend.Op(
    "quantize_rows(Tensor w) -> (Tensor, Tensor)",
    aten=quantize_rows_aten,
    triton=launch_quantize_rows,
    fake=lambda w: (w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)),
)
_dequantize_rows = backend.Op(
    "dequantize_rows(Tensor q, Tensor scale, ScalarType dtype) -> Tensor",
    aten=dequantize_rows_aten,
    fake=lambda q, scale, dtype: q.new_empty(q.shape, dtype=dtype),
)


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight row by row to int8.

    Args:
        w: [N, K], any floating dtype.

    Returns:
        q [N, K] int8 and scale [N] fp32 with `q * scale ~= w`; a row of zeros has scale 0.

    >>> quantize_rows(torch.tensor([[1.0, -127.0], [0.0, 0.0]]))
    (tensor([[   1, -127],
            [   0,    0]], dtype=torch.int8), tensor([1., 0.]))
    """
    if w.dim() != 2 or not w.is_floating_point() or w.shape[1] == 0:
        raise ValueError(f"quantize_rows takes a floating [N, K] matrix, K at least 1, not {w.dtype} {tuple(w.shape)}")
    implementation = quantize_rows_reference if backend.resolve(w) == "reference" else _quantize_rows
    return implementation(w.detach())


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that `quantize_rows` stored: `q * scale`, [N, K] in `dtype`.

    >>> dequantize_rows(torch.tensor([[2, 4]], dtype=torch.int8), torch.tensor([0.5]), torch.float32)
    tensor([[1., 2.]])
    """
    if q.dtype != torch.int8 or q.dim() != 2 or scale.shape != q.shape[:1]:
        raise ValueError(
            f"dequantize_rows takes int8 [N, K] and scale [N], not {q.dtype} {tuple(q.shape)} and {tuple(scale.shape)}"
        )
    implementation = dequantize_rows_reference if backend.resolve(q, scale) == "reference" else _dequantize_rows
    return implementation(q, scale.detach(), dtype)
