"""Every type on every target: what `auto` gives to Triton compiles and fits, at sizes that divide nothing.

A step, forward and backward, of every public function that launches, by the real way up to the launch itself: Triton
refuses a binary that exceeds the target's shared memory. The functions take the same sizes and so share binaries: a
width that no tile divides, one that fills whole steps of the K loop, a rank and rows that fill no tile.
"""

import pytest
import torch
from dry_driver import SHARED, dry

from u2a_fast import kernels
from u2a_fast.kernels import Attention, Half, Linear, Norm
from u2a_fast.kernels.compile_budgets import FLOPS
from u2a_fast.kernels.norm_joined import joined_weight

BATCH, TOKENS, WIDTH, EVEN, HEADS, RANK = 3, 37, 70, 256, 7, 5


class Operands:
    def __init__(self, dtype: torch.dtype, weights: str):
        self.dtype, self.weights = dtype, weights

    def leaf(self, *shape):
        return torch.randn(*shape, dtype=self.dtype, requires_grad=True)

    def norm(self):
        return Norm(self.leaf(WIDTH), self.leaf(WIDTH))

    def frozen(self, n, k):
        return Linear(torch.randn(n, k, dtype=self.dtype))

    def linear(self, k):
        """q, k and v with LoRA."""
        lead = 2 if self.weights == "float, wide q" else 1
        weight, scale = torch.randn((2 + lead) * WIDTH, k, dtype=self.dtype), None
        if "int8" in self.weights:
            weight, scale = kernels.quantize_rows(weight)
        rows = len(weight)
        low = self.leaf(3 * RANK, k), self.leaf(rows, RANK)
        return Linear(weight, self.leaf(rows), *low, scale, 0.7, 3, lead, self.weights == "int8 x int8")


def transformer_block(given):
    """With a weight that has room for B, and too many rows for attention's kernel: the rest is `norm_linear`'s."""
    qkv, fc1 = given.linear(WIDTH), given.linear(WIDTH)
    joined = joined_weight(fc1.weight, 3 * RANK)
    attention = Half(given.norm(), qkv, given.frozen(WIDTH, WIDTH))
    mlp = Half(given.norm(), fc1._replace(weight=joined[:, :WIDTH], joined=joined), given.frozen(WIDTH, 3 * WIDTH))
    see = Attention(HEADS, (1, BATCH * TOKENS, BATCH * TOKENS), None, 0, False)
    return kernels.transformer_block(given.leaf(1, BATCH * TOKENS, WIDTH), attention, mlp, see, "gelu")


def norm_linear(given):
    weight, bias, a, b, weight_scale, scaling, groups, lead, quantize, _ = given.linear(WIDTH)
    low = a, b, scaling, weight_scale, groups, lead, quantize
    return kernels.norm_linear(given.leaf(BATCH, TOKENS, WIDTH), *given.norm()[:3], weight, bias, *low)


def rms_norm_linear(given):
    norm, (weight, bias, a, b, _, scaling, groups, *_) = given.norm(), given.linear(WIDTH)
    low = a, b, scaling, None, groups
    return kernels.norm_linear(
        given.leaf(BATCH, TOKENS, WIDTH), norm.weight, None, norm.eps, weight, bias, *low, rms=True
    )


def lora_linear(given):
    """With dropout, whose mask is made in the tiles, and whole steps of the K loop."""
    weight, bias, a, b, weight_scale, scaling, groups, lead, quantize, _ = given.linear(EVEN)
    options = dict(groups=groups, lead=lead, dropout=0.1, seed=1, quantize_input=quantize)
    return kernels.lora_linear(given.leaf(TOKENS, EVEN), weight, bias, a, b, scaling, weight_scale, **options)


def assemble(given):
    """Learned rows on either side, and a sample that is absent."""
    learned = {"prefix": given.leaf(2, WIDTH), "suffix": given.leaf(3, WIDTH), "mask_token": given.leaf(WIDTH)}
    norm = dict(zip(("norm_weight", "norm_bias", "eps", "rms"), given.norm(), strict=True))
    present, tokens = torch.tensor([True, False, True]), given.leaf(BATCH, TOKENS, WIDTH)
    low = {"lora_a": given.leaf(3 * RANK, WIDTH), "quantize": given.weights == "int8 x int8"}
    h, s, rows = kernels.assemble_norm_project(tokens=tokens, present=present, **learned, **norm, **low)
    return h if torch.is_tensor(h) else h.like, s, rows


def attention(given):
    """Few queries of padded samples."""
    q, k, v = (given.leaf(BATCH, HEADS, rows, WIDTH // HEADS) for rows in (5, TOKENS, TOKENS))
    return kernels.attention(q, k, v, torch.tensor([30, 1, 17]), suffix=7)


def substitute(given):
    present = torch.tensor([[True, False, True]] * BATCH)
    return kernels.substitute(given.leaf(3, BATCH, WIDTH), given.leaf(3, 3, BATCH, WIDTH), present)


def attention_of_unequal(given):
    """Samples of several lengths, as a packed batch has them."""
    return kernels.attention_rows(given.leaf(TOKENS, 3 * WIDTH), None, HEADS, [(1, 3, 3), (1, TOKENS - 3, TOKENS - 3)])[
        0
    ]


def rotary(given):
    """With QK-norm, q and k of an odd number of heads each."""
    angles = (torch.randn(TOKENS, WIDTH // HEADS // 2) for _ in range(2))
    rows = given.leaf(TOKENS, 3 * WIDTH) * 1
    return kernels.rotary(rows, 2 * HEADS, *angles, torch.ones(2 * HEADS, WIDTH // HEADS, dtype=given.dtype))


def gated(given):
    return kernels.gated(given.leaf(TOKENS, 2 * WIDTH), "gelu"), kernels.gated(given.leaf(TOKENS, 2 * EVEN), "silu")


ATTENTION = attention, attention_of_unequal
EVERYTHING = transformer_block, norm_linear, lora_linear, assemble, *ATTENTION, substitute, rotary, gated
TYPES = {  # activations and what trains; autocast; frozen weights; the functions whose binaries differ from bf16's
    "bf16": (torch.bfloat16, None, "float", (*EVERYTHING, rms_norm_linear)),
    "fp16": (torch.float16, None, "float", (lora_linear,)),
    "bf16, wide q": (torch.bfloat16, None, "float, wide q", (lora_linear,)),
    "fp32": (torch.float32, None, "float", EVERYTHING),
    "autocast": (torch.float32, torch.bfloat16, "float", (norm_linear, lora_linear)),
    "int8": (torch.bfloat16, None, "int8", (lora_linear,)),
    "int8 x int8": (torch.bfloat16, None, "int8 x int8", (norm_linear, lora_linear)),
}


def step(type_):
    """A training step of each function."""
    dtype, autocast, weights, functions = TYPES[type_]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        for function in functions:
            results = function(Operands(dtype, weights))
            sum(t.float().sum() for t in (results if isinstance(results, tuple) else (results,))).backward()


@pytest.mark.slow
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("target", SHARED)
def test_what_auto_gives_to_triton_compiles_and_fits(target, type_):
    with dry(target, auto=True) as device:
        step(type_)
    assert device.launches.keys() == {binary.kernel for binary in device.binaries}
    assert bool(device.launches) == (type_ != "fp32")  # whose tiles do not fit: ATen's


def test_auto_gives_triton_fp32_rows_that_autocast_computes_with_in_bf16():
    with dry("sm_90", auto=True, compiles=False) as device:
        step("autocast")
    assert "assemble_norm_project_forward" in device.launches


def test_the_types_together_launch_every_kernel():
    with dry("sm_90", compiles=False) as device:
        for type_ in TYPES:
            step(type_)
    assert device.launches.keys() == FLOPS.keys()
