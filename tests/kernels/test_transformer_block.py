"""The block as one op: what its parts say one by one, in values, gradients and bytes kept."""

from functools import partial

import pytest
import torch
from block_cases import BATCH, HIDDEN, RANK, ROWS, WIDTH, halves, leaf, see
from running import moved, on, running, skip_wide_tiles
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from u2a_fast.kernels import Half, set_backend, transformer_block
from u2a_fast.memory import saved_bytes


def dense(x, linear):
    """`linear` written out."""
    weight = linear.weight if linear.weight_scale is None else linear.weight * linear.weight_scale[:, None].double()
    y = F.linear(x, weight, linear.bias)
    if linear.lora_a is None:
        return y
    factors, blocks = linear.lora_a.chunk(linear.groups), linear.lora_b.chunk(linear.groups + linear.lead - 1)
    parts = zip((*factors[:1] * linear.lead, *factors[1:]), blocks, strict=True)
    return y + linear.scaling * torch.cat([x @ a.t() @ b.t() for a, b in parts], dim=-1)


def normed(x, norm):
    if norm.rms:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return x if norm.weight is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def written_out(x, attention, mlp, see, act):
    def ending(x, update, half):
        return normed(x + update * (1 if half.scale is None else half.scale), half.after)

    qkv = dense(normed(x, attention.norm), attention.first)
    kv_heads = see.kv_heads or see.heads
    q, k, v = qkv.unflatten(-1, (-1, WIDTH // see.heads)).transpose(1, 2).split((see.heads, kv_heads, kv_heads), 1)
    k, v = (t.repeat_interleave(see.heads // kv_heads, 1) for t in (k, v))
    mask = torch.ones(BATCH, 1, ROWS, ROWS, dtype=torch.bool)
    if see.lengths is not None:
        position = torch.arange(ROWS)
        mask &= ((position < see.lengths[:, None]) | (position >= ROWS - see.suffix))[:, None, None]
    if see.causal:
        mask &= torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    if see.window is not None:
        at = torch.arange(BATCH * ROWS) if see.positions is None else see.positions
        at = at.view(BATCH, 1, ROWS)
        mask &= (at[..., None] - at[:, :, None]).abs() <= see.window
    out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    x = ending(x, dense(out, attention.second), attention)
    return ending(x, dense(act(dense(normed(x, mlp.norm), mlp.first)), mlp.second), mlp)


def swiglu(u):
    gate, up = u.chunk(2, -1)
    return F.silu(gate) * up


FOURTHS = 4 * torch.arange(BATCH * ROWS)  # positions, of which one in four is a row
CASES = {
    "pre-norm": ({}, see(), "gelu", F.gelu),
    "post-norm": ({"pre_norm": False}, see(), "gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    "scaled": ({"scale": True}, see(), "quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "no biases, no adapters": ({"bias": False, "adapter": False}, see(causal=True), "relu", F.relu),
    "padded": ({}, see(torch.tensor([3, 4]), suffix=1), "silu", F.silu),
    "two groups, one three times as wide": ({"fc1": (2, 3)}, see(), "gelu", F.gelu),
    "int8": ({"int8": True}, see(), "gelu", F.gelu),
    "gated": ({"gated": True}, see(), "gated_silu", swiglu),
    "gated, post-norm, int8": ({"gated": True, "int8": True, "pre_norm": False}, see(), "gated_silu", swiglu),
    "RMSNorm": ({"rms": True}, see(causal=True), "silu", F.silu),
    "RMSNorm after": ({"rms": True, "pre_norm": False}, see(), "gelu", F.gelu),
    "shared keys": ({"kv_heads": 1}, see(kv_heads=1), "gelu", F.gelu),
    "shared keys, window": ({"kv_heads": 1}, see(kv_heads=1, window=1), "gelu", F.gelu),
    "window of positions": ({}, see(causal=True, window=5, positions=FOURTHS), "gelu", F.gelu),
}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_formulas(case, implementation, device):
    skip_wide_tiles(implementation, device)
    options, seen, activation, act = CASES[case]
    x, (attention, mlp) = leaf(BATCH, ROWS, WIDTH, mean=0.5, std=1.0), halves(**options)
    leaves = [x, *(t for t in (*attention.trained, *mlp.trained) if t is not None)]
    rows = torch.ones(BATCH, ROWS, 1, dtype=torch.float64)
    if seen.lengths is not None:  # rows of padding are undefined
        rows[0, 3] = 0
    weight = torch.randn(BATCH, ROWS, WIDTH, dtype=torch.float64) * rows
    exact = written_out(x, attention, mlp, seen, act)
    with running(implementation, device):
        y = on(device, transformer_block)(x, attention, mlp, seen, activation)
        grads = torch.autograd.grad((y * weight).sum(), leaves)
    torch.testing.assert_close(y * rows, exact * rows, rtol=1e-9, atol=1e-9)
    for i, (got, expected) in enumerate(zip(grads, torch.autograd.grad((exact * weight).sum(), leaves), strict=True)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"leaf {i}: {m}")


@pytest.mark.parametrize("pre_norm", [True, False])
def test_every_subset_that_trains_gets_its_gradient_and_no_other(pre_norm, device):
    attention, mlp = halves(pre_norm)
    x = leaf(BATCH, ROWS, WIDTH)
    everything = [x, *attention.trained, *mlp.trained]
    block = on(device, transformer_block)
    full = torch.autograd.grad(block(x, attention, mlp, see(), "gelu").sum(), everything)
    for i, expected in enumerate(full):
        for j, t in enumerate(everything):
            t.requires_grad_(i == j)
        (got,) = torch.autograd.grad(block(x, attention, mlp, see(), "gelu").sum(), [everything[i]])
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_nothing_is_kept_for_a_frozen_mlp_but_its_input_and_the_activations(gated):
    attention, mlp = halves(adapter=False, gated=gated)
    x = leaf(BATCH, ROWS, WIDTH)
    for t in (*attention.trained, *mlp.trained):
        if t is not None:
            t.requires_grad_(False)
    trained = attention.second.lora_a.requires_grad_()
    parameters = [t for half in (attention, mlp) for t in (*half.trained, *half.frozen) if t is not None]
    activation, columns = ("gated_silu", 2) if gated else ("gelu", 1)
    kept = saved_bytes(lambda: transformer_block(x, attention, mlp, see(), activation), [*parameters, trained])
    rows = BATCH * ROWS
    numbers = rows * (WIDTH + 2 + 3 * WIDTH + WIDTH + 2 + RANK)  # x, statistics, q, k, v, out, log-sum-exp, s
    numbers += rows * (WIDTH + 2 + columns * HIDDEN)  # the sum before the MLP, statistics, what enters the activation
    assert kept <= 8 * numbers


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("part", ["first", "second"])
@pytest.mark.parametrize("half", [0, 1])
def test_a_parameter_may_not_change_before_backward(half, part, name):
    halves_ = halves()
    changed = getattr(getattr(halves_[half], part), name)
    y = transformer_block(leaf(BATCH, ROWS, WIDTH), *halves_, see(), "gelu")
    changed.detach().add_(0)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        y.sum().backward()


def test_the_input_may_not_change_before_backward():
    x = leaf(BATCH, ROWS, WIDTH) + 0
    y = transformer_block(x, *halves(), see(), "gelu")
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.sum().backward()


def test_selective_checkpointing_sees_every_op_and_change():
    asked = []

    def policy(context, op, *args, **options):
        asked.append(op)
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    context = partial(create_selective_checkpoint_contexts, policy)
    attention, mlp = halves()
    y = checkpoint(
        lambda x: transformer_block(x, attention, mlp, see(), "gelu"), leaf(BATCH, ROWS, WIDTH),
        use_reentrant=False, context_fn=context,
    )  # fmt: skip
    assert torch.ops.aten.addmm.default in asked and torch.ops.aten.linear.default not in asked
    with pytest.raises(RuntimeError, match="mutated"):  # the low-rank product is added to what the policy keeps
        y.sum().backward()


@pytest.mark.parametrize("x, see, activation, message", [
    (torch.ones(ROWS, WIDTH), see(), "gelu", r"x must be floating point \[B, T, D\]"),
    (torch.ones(BATCH, ROWS, WIDTH).int(), see(), "gelu", "not torch.int32"),
    (torch.ones(BATCH, ROWS + 1, WIDTH), see(), "gelu", r"groups \(2, 5, 5\) .* do not add up to the 12 rows"),
    (torch.ones(BATCH, ROWS, WIDTH), see(), "swish", "unknown activation 'swish': choose one of gelu"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(x, see, activation, message):
    with pytest.raises(ValueError, match=message):
        transformer_block(x, *halves(), see, activation)


def test_without_gradients_nothing_is_recorded(device):
    x, attention, mlp = moved((leaf(BATCH, ROWS, WIDTH), *halves()), device)
    with torch.no_grad():
        assert transformer_block(x, attention, mlp, see(), "gelu").grad_fn is None


def test_autocast_keeps_the_residual_stream_in_its_own_dtype(device):
    attention, mlp = halves()
    narrow = [Half(*(_in(part, torch.float32) for part in half)) for half in (attention, mlp)]
    x = torch.randn(BATCH, ROWS, WIDTH, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = on(device, transformer_block)(x, *narrow, see(), "gelu")
        exact = transformer_block(x.double(), attention, mlp, see(), "gelu")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == grad.dtype == torch.float32
    assert (y - exact).norm() < 0.02 * exact.norm()


def _in(part, dtype):
    if torch.is_tensor(part):
        return part.detach().to(dtype)
    return type(part)(*(t.detach().to(dtype) if torch.is_tensor(t) else t for t in part)) if part is not None else None


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, options", [("aot_eager", {}), ("inductor", {}), ("inductor", {"rms": True, "gated": True})]
)
def test_compiles_as_one_graph(backend, options):
    """On a CPU: a graph cannot hold attention that autograd differentiates inside a Function, as on a GPU."""
    set_backend("torch")
    x, (attention, mlp) = leaf(BATCH, ROWS, WIDTH), halves(**options)
    leaves = [t for t in (x, *attention.trained, *mlp.trained) if t is not None]

    def f(x):
        return transformer_block(x, attention, mlp, see(), "gated_gelu" if options.get("gated") else "gelu")

    expected = torch.autograd.grad(f(x).square().sum(), leaves)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend=backend)(x).square().sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
