"""Attention of short sequences, forward and backward, from q, k and v side by side: ours against SDPA.

    pytest benches/test_attention.py --benchmark-only -s

8 samples of 12 heads of 64. Ours recomputes or keeps the probabilities as it sees fit; "matmul" is attention written
out with autograd. Where bf16 is multiplied in hardware, SDPA's backward on a CPU is what is slow, and only there a
gain was promised.
"""

import pytest
import torch
from arms import DEVICE, FAST, hold, measure, name_of, nbytes, rotating
from torch.nn import functional as F

from u2a_fast import kernels
from u2a_fast.memory import saved_bytes

SAMPLES, HEADS, HEAD, ROUNDS = 8, 12, 64, 25
LENGTHS = [64, 128, 197, 256]


def heads_of(qkv, samples, heads):
    return qkv.view(samples, -1, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)


def rows_of(out):
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def attentions(samples, tokens, heads):
    groups = [kernels.Group(samples, tokens, tokens)]

    def sdpa(qkv):
        return rows_of(F.scaled_dot_product_attention(*heads_of(qkv, samples, heads)))

    def matmul(qkv):
        q, k, v = heads_of(qkv, samples, heads)
        return rows_of((q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=3) @ v)

    return {"sdpa": sdpa, "matmul": matmul, "ours": lambda qkv: kernels.attention_rows(qkv, None, heads, groups)[0]}


def time_attention(benchmark, tokens, rounds, samples=SAMPLES, heads=HEADS, dtype=FAST):
    width, arms = heads * HEAD, attentions(samples, tokens, heads)

    def inputs():
        qkv = torch.randn(samples * tokens, 3 * width, device=DEVICE, dtype=dtype, requires_grad=True)
        return qkv, torch.randn(samples * tokens, width, device=DEVICE, dtype=dtype)

    qkv, d_out = inputs()
    expected = arms["sdpa"](qkv).float()
    assert all((attend(qkv).float() - expected).norm() < 0.02 * expected.norm() for attend in arms.values())
    turns = rotating(inputs, nbytes(qkv, d_out))

    def run(attend):
        qkv, d_out = next(turns)
        attend(qkv).backward(d_out)

    steps = {name: (lambda attend=attend: run(attend)) for name, attend in arms.items()}
    facts = {
        "saved_bytes": {name: saved_bytes(lambda attend=attend: attend(qkv)) for name, attend in arms.items()},
        "bytes": nbytes(qkv, qkv, d_out, d_out),
        "tokens": tokens,
        "real_rows": samples * tokens,
    }
    flops = 3 * 4 * samples * tokens**2 * width  # a forward and twice as much backward
    return measure(benchmark, steps, "sdpa", rounds, dtype=dtype, useful_flops=flops, **facts)


@pytest.mark.parametrize("dtype", sorted({torch.float32, FAST}, key=str), ids=name_of)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention(benchmark, tokens, dtype):
    rows = time_attention(benchmark, tokens, ROUNDS, dtype=dtype)
    kind = "" if dtype == FAST else f" in {name_of(dtype)}"
    hold(benchmark, {f"attention, {tokens} tokens: gain over SDPA{kind}": 1 / rows["ours"]["ratio"]})


def test_smoke(benchmark):
    time_attention(benchmark, 9, 2, samples=2, heads=2)
