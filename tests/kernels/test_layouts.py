"""Every op, on every backend, gives what it gives on contiguous operands: for any strides of any of them."""

import pytest
import torch
from running import CPU, on, running
from torch._subclasses.fake_tensor import FakeTensorMode

from u2a_fast import kernels

K, N, RANK, GROUPS = 20, 24, 5, 2


def every_second(t):
    """t as a view that skips every second element of its last dimension."""
    if t.ndim == 0:
        return t
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype).fill_(1)
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t):
    return t.mT.contiguous().mT if t.ndim > 1 else every_second(t)


def repeated(t):
    """One element, or one row of the last dimension, for all: stride 0."""
    return t.flatten()[:1].expand(t.shape) if t.ndim == 1 else t[:1].expand(t.shape)


def random(*shape):
    return torch.randn(shape)


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def lora_linear(x, weight, bias, lora_a, lora_b):
    return kernels.lora_linear(x, weight, bias, lora_a, lora_b, 0.5, groups=GROUPS)


def lora_linear_int8(x, weight, bias, lora_a, lora_b, scale, quantize_input=False):
    return kernels.lora_linear(
        x, weight, bias, lora_a, lora_b, 0.5, weight_scale=scale, groups=GROUPS, quantize_input=quantize_input
    )


def linear_lowrank(h, weight, bias, s, lora_b):
    return kernels.linear_lowrank(h, weight, bias, s, lora_b, 0.5, groups=GROUPS)


def assemble_norm_project(tokens, prefix, suffix, present, mask_token, norm_weight, norm_bias, lora_a):
    return kernels.assemble_norm_project(
        tokens=tokens,
        prefix=prefix,
        suffix=suffix,
        present=present,
        mask_token=mask_token,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        lora_a=lora_a,
    )


def norm_project(tokens, norm_weight, norm_bias, lora_a):
    names = {"tokens": tokens, "norm_weight": norm_weight, "norm_bias": norm_bias, "lora_a": lora_a}
    return kernels.assemble_norm_project(**names)


def attention(q, k, v, lengths):
    return kernels.attention(q, k, v, lengths, suffix=1, read_only=2)


def attention_rows(q, kv, lora_a):
    return kernels.attention_rows(q, kv, 2, [kernels.Group(2, 3, 3)], lora_a, kv_heads=1)


def norm_linear(x, norm_weight, norm_bias, *linear):
    return kernels.norm_linear(x, norm_weight, norm_bias, 1e-5, *linear, 0.5, groups=GROUPS)


def norm_linear_frozen(x, norm_weight, norm_bias, weight, *linear):
    return norm_linear(x, norm_weight, norm_bias, weight.detach(), *linear)


LINEAR = [random(3, 4, K), random(N, K), random(N), random(GROUPS * RANK, K), random(N, RANK)]
QUANTIZED = [LINEAR[0], int8(N, K), *LINEAR[2:], torch.rand(N)]
ROWS = [random(2, 3, K), random(2, K), random(1, K), torch.tensor([True, False]), random(K)]
PRESENT = torch.tensor([[True, True], [False, True], [True, False]])
CASES = {
    "lora_linear": (lora_linear, LINEAR),
    "lora_linear int8": (lora_linear_int8, QUANTIZED),
    "lora_linear int8 x int8": (lambda *operands: lora_linear_int8(*operands, quantize_input=True), QUANTIZED),
    "linear_lowrank": (linear_lowrank, [*LINEAR[:3], random(3, 4, GROUPS * RANK), LINEAR[4]]),
    "assemble": (kernels.assemble, ROWS),
    "assemble_norm_project": (assemble_norm_project, [*ROWS, random(K), random(K), random(RANK, K)]),
    "norm_project": (norm_project, [ROWS[0], random(K), random(K), random(RANK, K)]),
    "substitute": (kernels.substitute, [random(2, 3, K), random(2, 2, 3, K), PRESENT]),
    "attention": (attention, [*(random(3, 2, 9, 8) for _ in range(3)), torch.tensor([6, 3, 5])]),
    "attention_rows": (attention_rows, [random(6, K), random(6, K), random(RANK, K)]),
    "norm_linear": (norm_linear, [LINEAR[0], random(K), random(K), *LINEAR[1:]]),
    "norm_linear, frozen": (norm_linear_frozen, [LINEAR[0], random(K), random(K), *LINEAR[1:]]),
    "layer_norm": (kernels.layer_norm, [ROWS[0], random(K), random(K)]),
    "rms_norm": (kernels.rms_norm, [ROWS[0], random(K)]),
    "gated": (lambda h: kernels.gated(h, "silu"), [ROWS[0]]),
    "quantize_rows": (kernels.quantize_rows, [random(N, K)]),
    "dequantize_rows": (lambda q, s: kernels.dequantize_rows(q, s, torch.float32), [int8(N, K), torch.rand(N)]),
}


def results(function, operands):
    """What the op returns, and the gradients of everything that may have one."""
    operands = [t.detach().requires_grad_(t.is_floating_point()) for t in operands]
    out = function(*operands)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    trained = [t for t in out if t.requires_grad]
    if not trained:
        return out
    total = sum((t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in trained)
    return [*out, *torch.autograd.grad(total, [t for t in operands if t.requires_grad], allow_unused=True)]


@pytest.mark.parametrize("layout", [every_second, transposed, repeated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_strides_change_nothing(implementation, name, dtype, layout, device):
    function, operands = CASES[name]
    views = [layout(t.to(dtype) if t.is_floating_point() else t) for t in operands]
    with running(implementation, device):
        expected, found = (results(on(device, function), each) for each in ([t.contiguous() for t in views], views))
    limit = 1e-5 if device == CPU else 1e-4  # a GPU's library adds up by the layout
    if dtype == torch.bfloat16:  # so does a CPU's in bf16
        limit = 4 * torch.finfo(dtype).eps
    for one, other in zip(expected, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = max(1.0, one.abs().max().item())
            torch.testing.assert_close(other, one, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("layout", [every_second, transposed, repeated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_is_traced_has_the_strides_of_what_runs(name, dtype, layout, monkeypatch):
    """Or code that was compiled for them stops at the gradients of transposed operands."""
    function, operands = CASES[name]
    views = [layout(t.to(dtype) if t.is_floating_point() else t) for t in operands]
    runs = [t for t in results(function, views) if t is not None]
    monkeypatch.setattr(kernels.backend.Op, "__call__", lambda op, *given: op.registered(*given))  # as in a trace
    with FakeTensorMode() as fake:
        traced = [t for t in results(function, [fake.from_tensor(t) for t in views]) if t is not None]
    assert [(t.shape, t.dtype, t.stride()) for t in traced] == [(t.shape, t.dtype, t.stride()) for t in runs]
