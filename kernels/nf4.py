"""A linear layer with LoRA whose frozen weight is stored in 4 bits.

    S = dropout(x) A^T        y = x W^T + b + s S B^T        w = level of its 4 bits * absmax of its 64 neighbours

x [M, K], W [N, K], b [N], A [groups * r, K], B [N, r], s a number; M counts all leading dimensions of x. With `groups`
projections side by side, the first `lead` times as wide as each other, group g of the outputs uses block g of S. W is
unpacked for the forward and again for dX, so that nothing of its size is kept. Levels and packing are bitsandbytes'
NormalFloat. S is plain PyTorch and differentiated by it: beside the unpacking it costs little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backend, products
from .chunks import flat
from .dropout import drop
from .linear_backward import group_widths
from .linear_lowrank import check_factors, linear_lowrank

NF4_BLOCK = 64  # weights that share an absmax
CHUNK = 1 << 18  # weights packed at a time on a CPU, where bitsandbytes needs several times their memory; whole blocks


def bitsandbytes() -> Any:
    """Its functional module; ImportError with what to install where it is missing."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("nf4 needs bitsandbytes: pip install u2a-fast[bnb]") from error
    return functional


def pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight `[N, K]` -> packed `[ceil(N * K / 2), 1]` uint8 and absmax `[ceil(N * K / 64)]` fp32.

    >>> packed, absmax = pack_nf4(torch.eye(8))
    >>> packed.shape, absmax
    (torch.Size([32, 1]), tensor([1.]))
    """
    flat = weight.contiguous().view(-1)
    packed = flat.new_empty(-(-flat.numel() // 2), 1, dtype=torch.uint8)
    absmax = flat.new_empty(-(-flat.numel() // NF4_BLOCK), dtype=torch.float32)
    step = CHUNK if flat.device.type == "cpu" else max(1, flat.numel())
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        chunk = chunk.float() if chunk.dtype == torch.float64 else chunk
        part, state = bitsandbytes().quantize_4bit(chunk, blocksize=NF4_BLOCK, quant_type="nf4")
        packed[start // 2 :][: len(part)] = part
        absmax[start // NF4_BLOCK :][: len(state.absmax)] = state.absmax
    return packed, absmax


def unpack_nf4(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The `[N, K]` weight in `dtype`.

    Raises:
        TypeError, ValueError: packed weights of another dtype or number.

    >>> unpack_nf4(*pack_nf4(torch.eye(2)), (2, 2), torch.float32)
    tensor([[1., 0.],
            [0., 1.]])
    """
    _check_stored(packed, absmax, shape)
    computed = torch.float32 if dtype == torch.float64 else dtype
    # bitsandbytes' CPU kernels read rows as whole blocks of weights: a matrix whose rows are not is given as blocks.
    count = shape[0] * shape[1]
    width = shape[1] if shape[1] % NF4_BLOCK == 0 else NF4_BLOCK if count % NF4_BLOCK == 0 else count
    # Without its table of levels, which would be copied to the device at every use: the kernels have their own.
    options = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "dtype": computed}
    state = bitsandbytes().QuantState(absmax, shape=torch.Size((count // width, width)), **options)
    return bitsandbytes().dequantize_4bit(packed, state).view(shape).to(dtype)


def _check_stored(packed: Tensor, absmax: Tensor, shape: tuple[int, int]) -> None:
    count = shape[0] * shape[1]
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, two weights a byte, not {packed.dtype}: see pack_nf4")
    if packed.numel() != -(-count // 2):
        raise ValueError(f"packed holds {2 * packed.numel()} weights, which is not {shape[0]} x {shape[1]}")
    if absmax.numel() != -(-count // NF4_BLOCK):
        raise ValueError(
            f"absmax must be one number for {NF4_BLOCK} of {count} weights each, not {absmax.numel()}: see pack_nf4"
        )


class _Nf4Lowrank(torch.autograd.Function):
    """`linear_lowrank` of rows `[M, K]` over a packed weight, which is kept as it is."""

    @staticmethod
    def forward(ctx, x, packed, absmax, shape, bias, s, lora_b, scaling, groups, lead):
        ctx.shape, ctx.scaling, ctx.widths = shape, scaling, group_widths(shape[0], groups, lead)
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_s, needs_b = ctx.needs_input_grad[5:7]
        ctx.save_for_backward(packed, absmax, s if needs_b else None, lora_b if needs_s else None)
        weight = unpack_nf4(packed, absmax, shape, x.dtype)
        return linear_lowrank(x, weight, bias, s, lora_b, scaling, groups=groups, lead=lead)

    @staticmethod
    @backend.outside_autocast
    def backward(ctx, dy):
        """dX = dY W, dS = s dY B, dB = s dY^T S, the last two block by block."""
        packed, absmax, s, lora_b = ctx.saved_tensors
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        blocks, ds, db = dy.split(ctx.widths, dim=1), None, None
        if lora_b is not None:
            factors = lora_b.to(dy.dtype).split(ctx.widths)
            ds = torch.cat([products.mm(g, b) for g, b in zip(blocks, factors, strict=True)], dim=1).mul_(ctx.scaling)
        if s is not None:
            parts = s.chunk(len(blocks), dim=1)
            db = torch.cat([products.mm(g.t(), part) for g, part in zip(blocks, parts, strict=True)]).mul_(ctx.scaling)
        return (
            products.mm(dy, unpack_nf4(packed, absmax, ctx.shape, dy.dtype)) if needs_x else None,
            *[None] * 3,
            flat(dy).sum(0, dtype=ctx.bias_dtype) if needs_bias else None,
            *(ds, db, None, None, None),
        )


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None = None,
    s: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    groups: int = 1,
    lead: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """`x W^T + b + scaling S B^T` over a 4-bit weight, `[..., N]` in the dtype of x or of autocast.

    Args:
        x: `[..., K]`.
        packed: `[ceil(N * K / 2), 1]` uint8, from `pack_nf4`.
        absmax: `[ceil(N * K / 64)]` fp32, from `pack_nf4`.
        shape: `(N, K)`.
        bias: `[N]` or None.
        s: `[..., groups * r]`, x A^T without the scaling, where it is computed already.
        lora_a: `[groups * r, K]`, where `s` is not given.
        lora_b: `[N, r]`; None: the frozen product alone.
        scaling: multiplies the low-rank product.
        groups: projections side by side in N, 3 for q, k, v.
        lead: how many times as wide as each other the first of them is.
        dropout: probability that an element of x is dropped on its way to `lora_a`; the seed is torch's generator's.

    Gradients reach x, bias, s, lora_a and lora_b.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `packed` and `absmax` are not of N * K weights, `lora_b` goes without one of `s` and `lora_a`, or
            does not fit it, or a dropout outside [0, 1).
        ImportError: bitsandbytes is missing.

    >>> packed, absmax = pack_nf4(torch.eye(8))
    >>> nf4_linear(torch.arange(8.0), packed, absmax, (8, 8), s=torch.ones(1), lora_b=torch.ones(8, 1), scaling=0.5)
    tensor([0.5000, 1.5000, 2.5000, 3.5000, 4.5000, 5.5000, 6.5000, 7.5000])
    """
    _check_stored(packed, absmax, shape)
    if (lora_b is None) != (s is None and lora_a is None) or (s is not None and lora_a is not None):
        raise ValueError("lora_b goes with either s or lora_a: give one of the two with it, and none without it")
    if lora_a is not None:
        check_factors(lora_a, lora_b, groups, x.shape[-1])
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    x = backend.in_autocast_dtype(x)
    if lora_b is not None:
        if s is None:
            s = linear_lowrank(_dropped(x, dropout), lora_a.to(x.dtype), None, None, None, 1.0)
        s = s.to(x.dtype)
    if backend.resolve(x, packed, absmax, bias, s, lora_b) == "reference":
        weight = unpack_nf4(packed, absmax, shape, x.dtype)
        return linear_lowrank(x, weight, bias, s, lora_b, scaling, groups=groups, lead=lead)
    # By rows: a view that a Function has made, the rotation of q and k could not write to.
    y = _Nf4Lowrank.apply(flat(x), packed, absmax, shape, bias, flat(s), lora_b, scaling, groups, lead)
    return y.view(*x.shape[:-1], shape[0])


def _dropped(x: Tensor, p: float) -> Tensor:
    """x with zeros where it is dropped: the elements that `lora_linear` would drop from the same generator."""
    if p == 0:
        return x
    seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
    return drop(x, p, seed) / (1 - p)
