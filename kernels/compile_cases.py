"""What the compile report compiles; the budgets that it checks are compile_budgets.py.

A case calls launchers as its op does, on meta tensors of real models' sizes; whatever they launch becomes a row.
A binary depends on the dtypes, the rank and the tile, not on the sizes, so the question is what to compile for which
target. Every target gets each kernel that multiplies matrices once, and one of the two half precisions: tiles and
budgets are the same for both. What has room is asked for the rank that people use, what has least for the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .assemble_aten import Leaves
from .assemble_backward import backward_triton as assemble_backward_triton
from .assemble_norm_project import forward_triton as assemble_forward_triton
from .attention_short import short_backward, short_forward
from .attention_small_query import backward_triton as attention_backward_triton
from .attention_small_query import forward_triton as attention_forward_triton
from .attention_varlen import Ends
from .gated import backward_triton as gated_backward_triton
from .gated import forward_triton as gated_forward_triton
from .linear_backward import launch_input, linear_backward_triton
from .linear_lowrank import linear_lowrank_triton
from .lora_linear import project_triton
from .norm_joined import ROOM
from .quantize import launch_quantize_rows
from .rotary import backward_triton as rotary_backward_triton
from .rotary import forward_triton as rotary_forward_triton
from .substitute import backward_triton as substitute_backward_triton
from .substitute import forward_triton as substitute_forward_triton

ROOMY = ("sm_80", "sm_90", "sm_100", "gfx942")  # bf16 at rank 8
SMALL = ("sm_86", "sm_120", "gfx90a")  # fp16 at rank 64; sm_89 runs the binaries of sm_86
TIGHTEST = ("sm_86", "gfx90a")  # what makes a kernel larger fails here first: dropout, learned rows
PLAIN = ("sm_90", "gfx942")  # no matrix unit, next to no shared memory: once for each assembler


@dataclass(frozen=True)
class Shape:
    model: str
    batch: int
    tokens: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def meta(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")


VIT_B = Shape("ViT-B", 64, 197, 768)
SHAPES = (VIT_B, Shape("ViT-L", 64, 197, 1024), Shape("BERT-base", 96, 128, 768))
GROUPS = 3  # q, k, v in one product


@dataclass(frozen=True)
class Case:
    """`run(shape, rank)` launches `phase` ("forward" or "backward") of the public function `function`.

    `minimum_bytes(shape, rank)`: what any implementation must read and write; the launches may move 1.05 times as much.
    """

    function: str
    phase: str
    variant: str
    run: Callable[[Shape, int], object]
    targets: tuple[str, ...] = ROOMY
    rank: int = 8
    dtype: torch.dtype = torch.bfloat16
    minimum_bytes: Callable[[Shape, int], int] | None = None


def _weight(meta: Callable, n: int, k: int, int8: bool) -> tuple[Tensor, Tensor | None]:
    return (meta(n, k, dtype=torch.int8), meta(n, dtype=torch.float32)) if int8 else (meta(n, k), None)


def _adapter(shape: Shape, rank: int, lead: int = 1) -> tuple[Tensor, Tensor]:
    meta = shape.meta
    a = meta(GROUPS * rank, shape.width, dtype=torch.float32)
    return a, meta((GROUPS + lead - 1) * shape.width, rank, dtype=torch.float32)


def frozen_linear(shape: Shape) -> tuple[int, int]:
    """The yardstick of the ratios: bytes and operations of the q, k, v product alone, which is the library's."""
    m, k, n = shape.rows, shape.width, GROUPS * shape.width
    return 2 * (m * k + n * k + n + m * n), 2 * m * n * k


def linear_lowrank_forward(shape: Shape, rank: int, int8: bool = False, quantized: bool = False, lead: int = 1):
    meta = shape.meta
    k, n = shape.width, (GROUPS + lead - 1) * shape.width
    weight, scale = _weight(meta, n, k, int8)
    s, lora_b = meta(shape.rows, GROUPS * rank), _adapter(shape, rank, lead)[1]
    h = meta(shape.rows, k)
    rows = (meta(shape.rows, k, dtype=torch.int8), meta(shape.rows, dtype=torch.float32)) if quantized else (None, None)
    linear_lowrank_triton(h, weight, meta(n), s, lora_b, 2.0, scale, GROUPS, lead, quantized, *rows)


def linear_lowrank_backward(shape: Shape, rank: int, int8: bool = False, lead: int = 1):
    meta = shape.meta
    n = (GROUPS + lead - 1) * shape.width
    weight, scale = _weight(meta, n, shape.width, int8)
    s, lora_b = meta(shape.rows, GROUPS * rank), _adapter(shape, rank, lead)[1]
    dy, groups = meta(shape.rows, n), (GROUPS, lead)
    linear_backward_triton(dy, None, weight, scale, s, None, lora_b, 2.0, *groups, 0.0, None, True)


def quantize_rows(shape: Shape, rank: int):
    launch_quantize_rows(shape.meta(shape.rows, shape.width))


def lora_linear_forward(shape: Shape, rank: int):
    meta = shape.meta
    project_triton(meta(shape.rows, shape.width), _adapter(shape, rank)[0], 0.0, None)
    linear_lowrank_forward(shape, rank)


def lora_linear_backward(shape: Shape, rank: int):
    meta = shape.meta
    n, adapter = GROUPS * shape.width, _adapter(shape, rank)
    dy, x, s = meta(shape.rows, n), meta(shape.rows, shape.width), meta(shape.rows, GROUPS * rank)
    linear_backward_triton(dy, x, meta(n, shape.width), None, s, *adapter, 2.0, GROUPS, 1, 0.0, None, False)


def dropped_input_grad(shape: Shape, rank: int):
    """With dropout the mask is hashed in the GEMM's largest tile: the launch that could run out of registers."""
    meta = shape.meta
    n, lora_a = GROUPS * shape.width, _adapter(shape, rank)[0]
    g, seed = meta(shape.rows, GROUPS * rank), meta(dtype=torch.int64)
    launch_input(meta(shape.rows, n), meta(n, shape.width), None, g, lora_a, 0.1, seed)


PROMPTS = 4  # learned rows before the tokens; one mask token row after them
HEADS, QUERIES = 64, 4  # columns of an attention head, read-only rows


def _joined(shape: Shape) -> int:
    return PROMPTS + shape.tokens + 1


def assemble_forward(
    shape: Shape, rank: int, joined: bool = False, quantize: bool = False, pitch: int | None = None, rms: bool = False
):
    """The norm and S of a block's input; `joined`: of the first block's, with learned rows and absent samples."""
    meta = shape.meta
    k, f = shape.width, torch.float32
    prefix, suffix, mask_token = (meta(*s, dtype=f) if joined else None for s in ((PROMPTS, k), (1, k), (k,)))
    present = meta(shape.batch, dtype=torch.bool) if joined else None
    lora_a = _adapter(shape, rank)[0]
    norm = meta(k), None if rms else meta(k)
    tokens = meta(shape.batch, shape.tokens, k)
    assemble_forward_triton(
        tokens, prefix, suffix, present, mask_token, *norm, lora_a, 1e-6, rms, shape.dtype, quantize, pitch
    )


def assemble_beside(shape: Shape, rank: int):
    """S in the same rows as h, for a weight that has B beside it."""
    assemble_forward(shape, rank, pitch=shape.width + -(-GROUPS * rank // ROOM) * ROOM)


def assemble_forward_bytes(shape: Shape, rank: int, joined: bool = False) -> int:
    """Tokens in; h, S, mean, 1 / standard deviation and, if joined, the rows out."""
    rows = shape.batch * (_joined(shape) if joined else shape.tokens)
    return 2 * shape.width * (shape.rows + rows * (2 if joined else 1)) + rows * (2 * GROUPS * rank + 8)


def quantized_forward_bytes(shape: Shape, rank: int) -> int:
    """Tokens in; q, its scale, S, mean and 1 / standard deviation out."""
    return shape.rows * (3 * shape.width + 2 * GROUPS * rank + 12)


def assemble_backward(shape: Shape, rank: int, adapter: bool = True, everything: bool = False, rms: bool = False):
    """`everything`: learned rows and absent samples, and a norm that trains (BitFit)."""
    meta = shape.meta
    k, t, f = shape.width, _joined(shape) if everything else shape.tokens, torch.float32
    d_rows, d_h, rows = (meta(shape.batch, t, k) for _ in range(3))
    d_s = meta(shape.batch, t, GROUPS * rank) if adapter else None
    stats = (None if rms else meta(shape.batch * t, dtype=f)), meta(shape.batch * t, dtype=f)
    present = meta(shape.batch, dtype=torch.bool) if everything else None
    first = PROMPTS if everything else 0
    needs = Leaves(True, *[everything] * 5, adapter)
    assemble_backward_triton(
        *(d_rows, d_h, d_s, rows, *stats, meta(k), meta(k), _adapter(shape, rank)[0] if adapter else None, present),
        *(shape.batch, first, first + shape.tokens, 1e-6, shape.dtype, needs),
    )


def assemble_backward_bytes(shape: Shape, rank: int) -> int:
    """Both gradients, the rows and their statistics in; the gradient of the tokens out. Without an adapter."""
    return shape.rows * (4 * 2 * shape.width + 8)


def _class_tokens(shape: Shape):
    meta = shape.meta
    tokens, proxies = meta(2, shape.batch, shape.width), meta(2, 2, shape.batch, shape.width)
    return tokens, proxies, meta(shape.batch, 2, dtype=torch.bool)


def substitute_forward(shape: Shape, rank: int):
    substitute_forward_triton(*_class_tokens(shape))


def substitute_backward(shape: Shape, rank: int):
    meta = shape.meta
    d_fused, d_align = meta(shape.batch, shape.width), meta(dtype=torch.float32)
    substitute_backward_triton(d_fused, d_align, *_class_tokens(shape), True)


def _few_queries(shape: Shape):
    meta = shape.meta
    heads = shape.width // HEADS
    k, v = meta(shape.batch, shape.tokens, 2, heads, HEADS).permute(2, 0, 3, 1, 4)
    return meta(shape.batch, heads, QUERIES, HEADS), k, v, meta(shape.batch, dtype=torch.int64)


def attention_forward(shape: Shape, rank: int):
    attention_forward_triton(*_few_queries(shape), PROMPTS)


def attention_backward(shape: Shape, rank: int):
    meta = shape.meta
    q, k, v, lengths = _few_queries(shape)
    lse = meta(q.shape[0] * q.shape[1], QUERIES, dtype=torch.float32)
    attention_backward_triton(torch.empty_like(q), q, k, v, lengths, torch.empty_like(q), lse, PROMPTS)


def _short_samples(shape: Shape):
    """q, k and v side by side, heads twice, and where samples of at most shape.tokens rows end."""
    ends, heads = shape.meta(shape.batch + 1, dtype=torch.int32), shape.width // HEADS
    qkv = shape.meta(shape.rows, GROUPS * shape.width)
    return qkv, (heads, heads, Ends(ends, ends, shape.tokens, shape.tokens))


def short_samples_forward(shape: Shape, rank: int):
    qkv, options = _short_samples(shape)
    short_forward(*qkv.chunk(GROUPS, 1), *options)


def short_samples_backward(shape: Shape, rank: int):
    qkv, options = _short_samples(shape)
    out, lse = shape.meta(shape.rows, shape.width), shape.meta(shape.rows, options[0], dtype=torch.float32)
    grads = torch.empty_like(qkv).chunk(GROUPS, 1)
    short_backward(torch.empty_like(out), *qkv.chunk(GROUPS, 1), out, lse, *grads, *options)


def _angles_and_weight(shape: Shape):
    """Of q and k: heads, cos, sin, QK-norm's weight, eps."""
    angles = (shape.meta(shape.rows, HEADS // 2, dtype=torch.float32) for _ in range(2))
    heads = 2 * shape.width // HEADS
    return heads, *angles, shape.meta(heads, HEADS), 1e-6


def rotary_forward(shape: Shape, rank: int):
    rotary_forward_triton(shape.meta(shape.rows, GROUPS * shape.width), *_angles_and_weight(shape))


def rotary_backward(shape: Shape, rank: int):
    kept = shape.meta(shape.rows, 2 * shape.width)
    rotary_backward_triton(shape.meta(shape.rows, GROUPS * shape.width), kept, *_angles_and_weight(shape))


def _hidden(shape: Shape, columns: int) -> Tensor:
    return shape.meta(shape.rows, 4 * shape.width * columns)


def gated_forward(shape: Shape, rank: int):
    gated_forward_triton(_hidden(shape, 2), "silu")


def gated_backward(shape: Shape, rank: int):
    gated_backward_triton(_hidden(shape, 1), _hidden(shape, 2), "gelu")


def gated_bytes(shape: Shape, rank: int, columns: int) -> int:
    return 2 * shape.rows * 4 * shape.width * columns


def plain(function: str, phase: str, run: Callable, minimum_bytes: Callable | None = None) -> list[Case]:
    """For every target, in the one half precision or in the other."""
    return [
        Case(function, phase, "bf16", run, ROOMY, 8, torch.bfloat16, minimum_bytes),
        Case(function, phase, "fp16", run, SMALL, 64, torch.float16, minimum_bytes),
    ]


def int8(function: str, phase: str, variant: str, run: Callable, small: tuple[str, ...] = SMALL) -> list[Case]:
    """Over an int8 weight."""
    return [
        Case(function, phase, variant, run, ROOMY),
        Case(function, phase, variant, run, small, 64, torch.float16),
    ]


LARGER = {"targets": TIGHTEST, "dtype": torch.float16}
CASES = [
    *plain("lora_linear", "forward", lora_linear_forward),
    *plain("lora_linear", "backward", lora_linear_backward),
    Case("lora_linear", "backward", "dropout", dropped_input_grad, **LARGER),
    *plain("linear_lowrank", "forward", linear_lowrank_forward),
    *int8("linear_lowrank", "forward", "int8", partial(linear_lowrank_forward, int8=True), TIGHTEST),
    *int8("linear_lowrank", "forward", "int8 x int8", partial(linear_lowrank_forward, int8=True, quantized=True)),
    *plain("linear_lowrank", "backward", linear_lowrank_backward),
    *int8("linear_lowrank", "backward", "int8", partial(linear_lowrank_backward, int8=True), TIGHTEST),
    Case("linear_lowrank", "forward", "wide q", partial(linear_lowrank_forward, lead=4), **LARGER),
    Case("linear_lowrank", "backward", "wide q", partial(linear_lowrank_backward, lead=4), **LARGER),
    Case("quantize_rows", "forward", "bf16", quantize_rows, PLAIN),
    *plain("assemble_norm_project", "forward", assemble_forward, assemble_forward_bytes),
    Case(
        *("assemble_norm_project", "forward", "joined", partial(assemble_forward, joined=True)),
        **LARGER,
        minimum_bytes=partial(assemble_forward_bytes, joined=True),
    ),
    Case("assemble_norm_project", "forward", "beside h", assemble_beside, **LARGER),
    Case(
        *("assemble_norm_project", "forward", "int8", partial(assemble_forward, quantize=True), PLAIN),
        minimum_bytes=quantized_forward_bytes,
    ),
    Case("assemble_norm_project", "forward", "RMSNorm", partial(assemble_forward, rms=True), PLAIN),
    *plain("assemble_norm_project", "backward", assemble_backward),
    Case(
        *("assemble_norm_project", "backward", "no adapter", partial(assemble_backward, adapter=False), PLAIN),
        minimum_bytes=assemble_backward_bytes,
    ),
    Case("assemble_norm_project", "backward", "all", partial(assemble_backward, everything=True), **LARGER),
    Case("assemble_norm_project", "backward", "RMSNorm", partial(assemble_backward, adapter=False, rms=True), PLAIN),
    Case("substitute", "forward", "bf16", substitute_forward, PLAIN),
    Case("substitute", "backward", "bf16", substitute_backward, PLAIN),
    Case("attention", "forward", "few queries", attention_forward, **LARGER),
    Case("attention", "backward", "few queries", attention_backward, **LARGER),
    *plain("attention", "forward", short_samples_forward),
    *plain("attention", "backward", short_samples_backward),
    Case("rotary", "forward", "QK-norm", rotary_forward, PLAIN),
    Case("rotary", "backward", "QK-norm", rotary_backward, PLAIN),
    Case("gated", "forward", "silu", gated_forward, PLAIN, minimum_bytes=partial(gated_bytes, columns=3)),
    Case("gated", "backward", "gelu", gated_backward, PLAIN, minimum_bytes=partial(gated_bytes, columns=5)),
]
