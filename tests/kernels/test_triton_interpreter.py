"""The tool under every kernel test: its bfloat16 is a GPU's, and each sanitizer sees the fault it is there for."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_interpreter import f32_to_bf16, install, interpreted

from u2a_fast.kernels import backend


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=ACC)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * K + (k + rk)[None, :], mask=(rm < M)[:, None] & (k + rk < K)[None, :], other=0)
        y = tl.load(b + (k + rk)[:, None] * N + rn[None, :], mask=(rn < N)[None, :] & (k + rk < K)[:, None], other=0)
        acc = tl.dot(x, y, acc, out_dtype=ACC, input_precision="ieee")
    tl.store(c + rm[:, None] * N + rn[None, :], acc.to(c.dtype.element_ty), mask=(rm < M)[:, None] & (rn < N)[None, :])


@triton.jit
def elementwise(x, y, z, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    a = tl.load(x + o, mask=o < n)
    b = tl.load(y + o, mask=o < n)
    tl.store(z + o, tl.where(a * b + a > 0, a * b + a, -a), mask=o < n)


@triton.jit
def reductions(x, out, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    tl.store(out, tl.max(v, 0))
    tl.store(out + 1, tl.sum(v, 0))


@triton.jit
def unmasked_copy(x, y, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o))


@triton.jit
def increment(y):
    tl.store(y, tl.load(y) + 1)


@triton.jit
def atomic_sum(x, y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.atomic_add(y + o % 4, tl.load(x + tl.program_id(0) * B + o))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, out, acc",
    [
        (torch.float64, torch.float64, tl.float64),
        (torch.float32, torch.float32, tl.float32),
        (torch.float16, torch.float32, tl.float32),
        (torch.bfloat16, torch.bfloat16, tl.float32),
        (torch.int8, torch.int32, tl.int32),
    ],
)
def test_matmul_equals_torchs(dtype, out, acc):
    a, b = torch.randn(70, 96), torch.randn(96, 50)
    a, b = (t.mul(40).round().to(dtype) if dtype == torch.int8 else t.to(dtype) for t in (a, b))
    c = torch.empty(70, 50, dtype=out)
    with interpreted(("bounds", "races", "order")):
        backend.launch(matmul, (3, 2), a=a, b=b, c=c, M=70, N=50, K=96, BM=32, BN=32, BK=32, ACC=acc)
    exact = a.double() @ b.double()
    rounding = 0 if dtype == torch.int8 else torch.finfo(out).eps
    assert (c.double() - exact).abs().max() <= 4 * rounding * exact.abs().max()


def test_rounding_to_bfloat16_equals_torchs_on_random_bit_patterns():
    values = torch.randint(-(2**31), 2**31 - 1, (1 << 18,), dtype=torch.int32).view(torch.float32)
    ours = torch.from_numpy(f32_to_bf16(values.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(ours.nan_to_num(), values.bfloat16().nan_to_num())
    assert torch.equal(ours.isnan(), values.isnan())


def test_bfloat16_arithmetic_comparison_and_reductions_equal_torchs():
    x, y, z = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16(), torch.empty(1000).bfloat16()
    reduced = torch.empty(2)
    with interpreted():
        backend.launch(elementwise, (4,), x=x, y=y, z=z, n=1000, B=256)
        backend.launch(reductions, (1,), x=x[:256], out=reduced, N=256)
    v = x * y + x
    assert torch.equal(z, torch.where(v > 0, v, -x))
    assert reduced[0] == x[:256].max()
    assert reduced[1] == x[:256].float().sum().bfloat16()


def test_memory_not_written_reads_as_nan():
    with interpreted():
        assert torch.empty(9).isnan().all()
        assert torch.randn(3).new_empty(9).isnan().all()


def test_a_read_past_the_end_is_caught():
    with interpreted(), pytest.raises(InterpreterError, match="OutOfBounds"):
        backend.launch(unmasked_copy, (2,), x=torch.randn(64), y=torch.empty(64), B=64)


def test_a_read_between_two_rows_of_a_view_is_inside_and_past_its_last_is_not():
    view = torch.randn(4, 10)[:, :5]
    with interpreted():
        backend.launch(unmasked_copy, (1,), x=view, y=torch.empty(32), B=32)
        with pytest.raises(InterpreterError, match="OutOfBounds"):
            backend.launch(unmasked_copy, (1,), x=view[:3], y=torch.empty(32), B=32)


def test_a_race_is_caught_and_atomics_are_none():
    with interpreted(("races",)):
        backend.launch(atomic_sum, (4,), x=torch.randn(1024), y=torch.zeros(4), B=256)
        with pytest.raises(InterpreterError, match="Race"):
            backend.launch(increment, (8,), y=torch.zeros(1))


def test_two_orders_expose_float_atomics():
    data, sums = torch.randn(64 * 256), []
    for seed in (1, 2):
        sums.append(torch.zeros(4))
        with interpreted(("order",), seed=seed):
            backend.launch(atomic_sum, (64,), x=data, y=sums[-1], B=256)
    assert not torch.equal(*sums)


def test_the_context_leaves_the_switch_and_torch_as_they_were():
    with interpreted() as launched:
        backend.launch(increment, (1,), y=torch.zeros(1))
        assert backend.get_backend() == "triton"
    assert launched == ["increment"]
    assert backend.get_backend() == "auto" and not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        backend.set_backend("triton"), backend.resolve(torch.zeros(1))
    backend.set_backend("auto")


def test_the_same_process_still_compiles_for_a_gpu():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    install()
    signature = {"x": "*fp32", "y": "*fp32", "B": "constexpr"}
    compiled = triton.compile(ASTSource(unmasked_copy, signature, {"B": 128}), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
