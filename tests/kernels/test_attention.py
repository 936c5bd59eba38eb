"""Attention with lengths, suffix and read-only rows: every implementation against plain PyTorch in fp64."""

import importlib

import pytest
import torch
from running import CPU, moved, on, running, skip_wide_tiles
from tolerance import assert_as_exact_as

from u2a_fast.kernels import attention, set_backend
from u2a_fast.kernels.attention_matmul import MATMUL_KEYS

module = importlib.import_module("u2a_fast.kernels.attention")  # the package's attribute of that name is the function
SANITIZERS = ("bounds", "races", "order")

# tokens, suffix rows, read-only rows, lengths (None, or one per sample), causal
CASES = {
    "plain": (9, 0, 0, None, False),
    "lengths": (9, 0, 0, (9, 0, 4), False),
    "suffix": (7, 2, 0, (7, 0, 3), False),
    "read-only": (6, 1, 3, None, False),
    "lengths, suffix, read-only": (6, 2, 3, (6, 0, 1), False),
    "read-only, nothing to see": (5, 0, 2, (0, 5, 1), False),
    "causal": (9, 0, 0, None, True),
    "causal with lengths": (8, 1, 0, (8, 0, 5), True),
    "causal, read-only": (5, 2, 3, (5, 1, 0), True),
    "beyond a block": (130, 3, 4, (130, 5, 64), False),
    "window": (9, 0, 0, None, False),
    "window, suffix": (9, 2, 0, None, False),
    "window, causal, suffix": (9, 2, 0, None, True),
    "window, lengths": (9, 0, 0, (9, 0, 4), False),
    "window, lengths, suffix": (9, 2, 0, (9, 0, 4), False),
    "window, lengths, causal, suffix": (9, 2, 0, (9, 0, 4), True),
    "window of positions": (9, 2, 0, (9, 0, 4), False),
    "window of positions, causal": (9, 2, 0, None, True),
    "window of shuffled positions, causal": (9, 2, 0, None, True),
    "window of the whole sample": (4, 3, 0, None, False),
}
WINDOW = 3


def buffer(case, dtype, heads=2, width=20, seed=0):
    """[B, S, 3, H, Dh] with a non-zero mean, as one q,k,v product leaves it."""
    tokens, suffix, read_only, _, _ = CASES[case]
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(3, tokens + suffix + read_only, 3, heads, width, generator=g, dtype=torch.float64) + 0.3).to(
        dtype
    )


def options(case):
    tokens, suffix, read_only, lengths, causal = CASES[case]
    lengths = None if lengths is None else torch.tensor(lengths)
    given = {"lengths": lengths, "suffix": suffix, "read_only": read_only, "causal": causal}
    if "window" in case:
        given["window"] = WINDOW
    if "positions" in case:  # with holes
        g = torch.Generator().manual_seed(2)
        given["positions"] = torch.randint(1, 4, (3, tokens + suffix), generator=g).cumsum(1)
    if "shuffled" in case:
        given["positions"] = given["positions"][:, torch.randperm(tokens + suffix, generator=g)]
    return given


def defined_rows(case, rows):
    """bool [B, S]: rows that are no padding."""
    tokens, _, _, lengths, _ = CASES[case]
    kept = torch.ones(3, rows, dtype=torch.bool)
    if lengths is not None:
        kept[:, :tokens] = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return kept


def of_buffer(qkv, **given):
    """q, k and v are views of the buffer."""
    return attention(*qkv.permute(2, 0, 3, 1, 4), **given)


def results(case, qkv, device):
    """The rows that are defined, and the gradient of a random combination of them."""
    leaf = qkv.detach().clone().requires_grad_()
    out = on(device, of_buffer)(leaf, **options(case))
    assert torch.isfinite(out).all()
    out = out.transpose(1, 2).masked_fill(~defined_rows(case, leaf.shape[1])[:, :, None, None], 0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    return out.detach(), torch.autograd.grad((out.double() * weight).sum(), leaf)[0]


def computed(implementation, case, qkv, device):
    with running(implementation, device, SANITIZERS) as launched:
        got = results(case, qkv, device)
    assert launched or implementation != "triton" or options(case)["causal"] or "window" in case
    return got


def plain(case, qkv, device=CPU):
    return computed("reference", case, qkv, device)


def by_hand(case, qkv):
    """softmax over the visible keys, row by row, in fp64."""
    tokens, suffix, _, lengths, causal = CASES[case]
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4)
    out, at = torch.zeros_like(q), options(case).get("positions", torch.arange(q.shape[2]).expand(3, -1))
    for b in range(q.shape[0]):
        valid = tokens if lengths is None else lengths[b]
        for i in range(q.shape[2]):
            seen = [j for j in (*range(valid), *range(tokens, tokens + suffix)) if not causal or j <= i]
            if "window" in case:
                seen = [j for j in seen if max(i, j) >= tokens or abs(at[b, i] - at[b, j]) <= WINDOW]
            if seen:
                p = torch.softmax((k[b][:, seen] @ q[b][:, i, :, None])[..., 0] * q.shape[3] ** -0.5, -1)
                out[b][:, i] = (p[..., None] * v[b][:, seen]).sum(1)
    return out.transpose(1, 2).masked_fill(~defined_rows(case, q.shape[2])[:, :, None, None], 0)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "beyond a block"])
def test_every_row_sees_what_it_should(case, implementation, device):
    qkv = buffer(case, torch.float64)
    torch.testing.assert_close(computed(implementation, case, qkv, device)[0], by_hand(case, qkv))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_float64_gradients_equal_those_of_plain_pytorch(case, implementation, device):
    qkv = buffer(case, torch.float64)
    for got, exact in zip(computed(implementation, case, qkv, device), plain(case, qkv), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_low_precision_is_as_exact_as_plain_low_precision(case, dtype, implementation, device):
    qkv = buffer(case, dtype)
    low, exact = plain(case, qkv, device), plain(case, qkv.double())
    for got, rough, true, factor in zip(computed(implementation, case, qkv, device), low, exact, (2, 3), strict=True):
        assert got.dtype == dtype
        assert_as_exact_as(got, rough, true, factor)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["read-only", "lengths, suffix, read-only", "causal, read-only", "beyond a block"])
def test_ordinary_rows_are_bitwise_what_they_are_without_read_only_rows(case, dtype, implementation, device):
    qkv, given = buffer(case, dtype), options(case)
    rows = qkv.shape[1] - given["read_only"]
    with running(implementation, device):
        out = on(device, of_buffer)(qkv, **given)
        without = on(device, of_buffer)(qkv[:, :rows], **given | {"read_only": 0})
    assert torch.equal(out[:, :, :rows], without)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("rows, keys, width", [(1, 9, 16), (4, 70, 24), (33, 20, 64)])
@pytest.mark.parametrize("heads", [2, 6])
def test_queries_may_be_fewer_or_more_than_keys_in_rows_and_heads(
    heads, rows, keys, width, implementation, dtype, device
):
    if dtype == torch.float64:
        skip_wide_tiles(implementation, device)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    kv = torch.randn(2, 3, keys, 2, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(3, heads, rows, width, generator=g, dtype=torch.float64)
    lengths = torch.tensor([keys - 2, 0, 1])

    def run(device):
        out = on(device, lambda q, kv, lengths: attention(q, *kv.transpose(2, 3), lengths, suffix=2))(q, kv, lengths)
        return out.detach(), *torch.autograd.grad((out.double() * weight).sum(), (q, kv))

    with running("reference", device):
        low = run(device)
    given, q, kv = (q, kv), *(t.detach().double().requires_grad_() for t in (q, kv))
    with running("reference", CPU):
        exact = run(CPU)
    q, kv = given
    with running(implementation, device, SANITIZERS) as launched:
        got = run(device)
    kernels = ["attention_small_query_forward", "attention_small_query_backward"]
    few = heads // 2 * rows <= 64  # those of one key head are rows of one program
    assert launched == (kernels if implementation == "triton" and few else [])
    for t, rough, true, factor in zip(got, low, exact, (2, 3, 3), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(t, true, rtol=1e-9, atol=1e-9)
        else:
            assert_as_exact_as(t, rough, true, factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("queries", [1, 3])
def test_queries_of_causal_attention_are_the_last_rows(queries, implementation, dtype, device):
    qkv, rows = buffer("causal with lengths", dtype), slice(-queries, None)
    lengths = torch.tensor([8, 0, 5])

    def last(qkv, lengths):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return attention(q[:, :, rows], k, v, lengths, suffix=1, causal=True)

    with running(implementation, device, SANITIZERS):
        got = on(device, last)(qkv, lengths)
    exact = by_hand("causal with lengths", qkv).transpose(1, 2)[:, :, rows]
    rough = plain("causal with lengths", qkv, device)[0].transpose(1, 2)[:, :, rows]
    got = got * defined_rows("causal with lengths", 9)[:, None, rows, None]
    if dtype == torch.float64:
        torch.testing.assert_close(got, exact)
    else:
        assert_as_exact_as(got, rough, exact, 2)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_keys_get_no_gradient_and_no_keys_give_zero(dtype, implementation, device):
    leaf = buffer("lengths", dtype).requires_grad_()
    with running(implementation, device, SANITIZERS):
        out = on(device, of_buffer)(leaf, lengths=torch.tensor([9, 0, 4]))
        (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert not out[1].any() and not grad[1].any()
    assert not grad[2, 4:, 1:].any() and grad[2, :4, 1:].all()


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_samples(dtype, implementation, device):
    qkv = torch.zeros(0, 5, 3, 2, 8, dtype=dtype, requires_grad=True)
    lengths = torch.zeros(0, dtype=torch.int64)
    with running(implementation, device):
        out = on(device, of_buffer)(qkv, lengths=lengths, read_only=1)
        out.sum().backward()
    assert out.shape == (0, 2, 5, 8) and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [{}, {"causal": True}, {"lengths": torch.tensor([3, 0])}], ids=str)
def test_no_queries(given, dtype, implementation, device):
    q = torch.zeros(2, 4, 0, 8, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 2, 5, 8).to(dtype).requires_grad_()
    with running(implementation, device):
        out = on(device, attention)(q, k, k, **given)
        out.sum().backward()
    assert out.shape == q.shape == q.grad.shape and not k.grad.any()


def test_matmul_runs_where_it_is_faster():
    set_backend("auto")
    q = torch.zeros(1, 1, 4, 8)
    long = torch.zeros(1, 1, MATMUL_KEYS + 1, 8)
    assert module.uses_matmul(q.bfloat16(), q.bfloat16())
    assert not module.uses_matmul(q, q) and not module.uses_matmul(q.half(), q.half())
    assert not module.uses_matmul(q.bfloat16(), long.bfloat16())


def test_backward_keeps_no_probabilities():
    set_backend("torch")
    qkv = torch.randn(2, 64, 3, 2, 8).bfloat16().requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        attention(*qkv.permute(2, 0, 3, 1, 4), lengths=torch.tensor([64, 3]))
    assert sum(kept.values()) == qkv.nbytes + 16


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_gradients_do_not_depend_on_program_order_or_run(implementation, device):
    qkv, runs = buffer("beyond a block", torch.bfloat16), []
    for seed in (0, 1, 2, 2):
        with running(implementation, device, ("order",), seed):
            runs.append(results("beyond a block", qkv, device))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_plain_interpreter_sees_the_strides_that_were_passed(monkeypatch):
    """It computes bfloat16 in fp32 copies; q, k and v are views with gaps, whose strides are arguments too."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda X, stride: seen.append((X.dtype, X.stride(), stride))

    seen, view = [], torch.ones(2, 5, 3, 8).bfloat16()[:, :, 1]
    monkeypatch.setattr(module.backend, "interpreting", lambda: True)
    module.backend.launch(Kernel(), (1,), X=view, stride=view.stride())
    assert seen == [(torch.float32, view.stride(), view.stride())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "causal, suffix, lengths, window",
    [(False, 2, True, None), (True, 0, True, None), (False, 0, False, None), (True, 1, True, 2)],
)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_opcheck(kv_heads, causal, suffix, lengths, window, device):
    set_backend("torch")
    q, k, v = torch.randn(3, 7, 4 + 2 * kv_heads, 8).transpose(1, 2).split((4, kv_heads, kv_heads), 1)
    lengths = torch.tensor([5, 0, 3]) if lengths else None
    forward, backward = module.attention_forward.registered, module.attention_backward.registered
    opcheck = on(device, torch.library.opcheck)
    positions = None if window is None else torch.randint(20, (3, 7))
    opcheck(forward, (q, k, v, lengths, suffix, causal, window, positions))
    opcheck(backward, (torch.randn_like(q), q, k, v, lengths, None, None, suffix, causal, window, positions))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads, window", [(1, None), (2, None), (1, 1)])
def test_gradcheck_of_every_subset(kv_heads, window, which, causal, device):
    """Of matmul + softmax itself, which fp64 does not reach through the public function."""
    rows = torch.randn(2, 5, 2 + 2 * kv_heads, 4, dtype=torch.float64)
    q, k, v = rows.transpose(1, 2).split((2, kv_heads, kv_heads), 1)
    leaves = [(q, k, v)[i].detach().clone().requires_grad_() for i in which]

    def outputs(*values):
        tensors = dict(zip(which, values, strict=True))
        given = (tensors.get(i, t) for i, t in enumerate((q, k, v)))
        return on(device, module._Attention.apply)(*given, torch.tensor([3, 0]), 1, causal, window, None)

    set_backend("torch")
    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_and_export(dtype, device):
    set_backend("torch")
    qkv = moved(buffer("lengths, suffix, read-only", dtype), device).requires_grad_()
    given = moved(options("lengths, suffix, read-only"), device)
    expected = of_buffer(qkv, **given)

    class Module(torch.nn.Module):
        def forward(self, qkv):
            return of_buffer(qkv, **given)

    out = torch.compile(Module(), fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(out, expected)
    for compiled, eager in zip(
        torch.autograd.grad(out.sum(), qkv), torch.autograd.grad(expected.sum(), qkv), strict=True
    ):
        torch.testing.assert_close(compiled, eager)
    nodes = [str(n.target) for n in torch.export.export(Module(), (qkv,)).graph.nodes]
    ops = 2 if module.uses_matmul(qkv, qkv) else 0  # of ours; SDPA is ATen's
    assert nodes.count("u2a_fast.attention.default") == ops


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_autocast_decides_the_dtype(implementation, device):
    set_backend(implementation)
    qkv = buffer("suffix", torch.float32).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = on(device, of_buffer)(qkv, **options("suffix"))
        mixed = on(device, attention)(q.bfloat16(), k, v.bfloat16(), **options("suffix"))  # of a linear, and of a norm
    assert out.dtype == torch.bfloat16 and torch.autograd.grad(out.sum(), qkv)[0].dtype == torch.float32
    assert torch.equal(mixed, out)


def test_autocast_around_backward_alone_changes_nothing(device):
    qkv = buffer("suffix", torch.float32).requires_grad_()
    grads = []
    for enabled in (False, True):
        out = on(device, of_buffer)(qkv, **options("suffix"))
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(out.sum(), qkv)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.ones(1, 2, 4, 9)}, ValueError, r"k, v \[B, H, S, Dh\]"),
        ({"q": torch.ones(1, 3, 4, 8)}, ValueError, "fewer heads that divide H"),
        (dict.fromkeys("qkv", torch.ones(1, 0, 4, 8)), ValueError, "fewer heads that divide H"),
        (dict.fromkeys("qkv", torch.ones(1, 2, 4, 0)), ValueError, r"q must be \[B, H, Sq, Dh\]"),
        ({"q": torch.ones(1, 2, 3, 8).half()}, TypeError, "one floating point dtype"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, ValueError, "lengths must be"),
        ({"lengths": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "packed first"),
        ({"suffix": 3, "read_only": 2}, ValueError, "counts of the 4 rows"),
        ({"suffix": -1}, ValueError, "counts of the 4 rows"),
        ({"q": torch.ones(1, 2, 3, 8), "read_only": 1}, ValueError, "as many rows"),
        ({"q": torch.ones(1, 2, 5, 8), "causal": True}, ValueError, "causal no more, not 5 and 4"),
        ({"q": torch.ones(1, 2, 3, 8), "window": 1}, ValueError, "q of the same rows as k and v"),
        ({"read_only": 1, "window": 1}, ValueError, "q of the same rows as k and v"),
        ({"window": -1}, ValueError, "0 or more, not -1"),
        ({"window": 1, "positions": torch.ones(4, dtype=torch.int64)}, ValueError, r"int64 \[1, 4\], not"),
        ({"window": 1, "positions": torch.ones(1, 4)}, ValueError, "not torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    given = {name: torch.ones(1, 2, 4, 8) for name in "qkv"}
    with pytest.raises(error, match=message):
        attention(**given | change)
