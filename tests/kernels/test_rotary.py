"""Rotary positions and QK-norm in place: every backend against the formulas in fp64 and against Hugging Face's."""

import importlib

import pytest
import torch
from running import CPU, moved, on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import chunks, linear_lowrank, rotary, set_backend
from u2a_fast.memory import saved_bytes

module = importlib.import_module("u2a_fast.kernels.rotary")  # the package's attribute of that name is the function
IMPLEMENTATIONS = ("reference", "torch", "triton")
SANITIZERS = ("bounds", "races", "order")
KINDS = ("rotary", "norm", "both")
# rows, heads, width of a head, columns behind them
SHAPES = [(5, 3, 8, 7), (70, 2, 6, 0), (1, 1, 2, 3), (0, 2, 4, 1), (13, 5, 66, 9), (9, 1, 256, 5)]
EPS = 2**-10  # exact in fp32: to a kernel on a GPU a number of Python is one


def operands(shape, kind, dtype):
    """(rows, heads, cos, sin, weight, eps) and the incoming gradient; means are not zero, one head is all zeros."""
    n, heads, width, rest = shape
    g = torch.Generator().manual_seed(0)
    rows, dy = (torch.randn(n, heads * width + rest, generator=g, dtype=torch.float64) + 0.4 for _ in range(2))
    if heads > 1:
        rows[:1, :width] = 0
    angles = torch.randn(n, width // 2, generator=g, dtype=torch.float64) * 3
    weight = torch.rand(heads, width, generator=g, dtype=torch.float64) + 0.5
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (None, None) if kind == "norm" else (angles.cos().to(wide), angles.sin().to(wide))
    weight = None if kind == "rotary" else weight.to(dtype)
    return (rows.to(dtype), heads, cos, sin, weight, EPS), dy.to(dtype)


def written_out(rows, heads, cos, sin, weight, eps):
    """As the models write it, every step in the dtype of the rows."""
    width = weight.shape[1] if cos is None else 2 * cos.shape[1]
    x, rest = rows.split([heads * width, rows.shape[1] - heads * width], 1)
    x = x.unflatten(1, (heads, width))
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    if cos is not None:
        cos, sin = (torch.cat([t, t], 1)[:, None].to(rows.dtype) for t in (cos, sin))
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        x = x * cos + half * sin
    return torch.cat([x.flatten(1), rest], 1)


def results(f, given, dy):
    leaf = given[0].detach().requires_grad_()
    y = f(leaf, *given[1:])
    return y.detach(), *torch.autograd.grad(y, leaf, dy)


def on_a_copy(rows, *rest):
    return rotary(rows.clone(), *rest)


def exactly(given):
    return [t.double() if torch.is_tensor(t) else t for t in given]


def computed(implementation, device, given, dy):
    with running(implementation, device, SANITIZERS) as launched:
        got = results(on(device, on_a_copy), given, dy)
    assert launched == (["rotary_forward", "rotary_backward"] if implementation == "triton" and len(given[0]) else [])
    return got


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formulas(shape, kind, implementation, device):
    given, dy = operands(shape, kind, torch.float64)
    expected = results(written_out, given, dy)
    for got, exact in zip(computed(implementation, device, given, dy), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_plain_low_precision(dtype, kind, implementation, device):
    given, dy = operands((70, 5, 34, 11), kind, dtype)
    plain = results(on(device, written_out), given, dy)
    exact = results(written_out, exactly(given), dy.double())
    got = computed(implementation, device, given, dy)
    for i, (t, rough, true) in enumerate(zip(got, plain, exact, strict=True)):
        assert t.dtype == dtype
        assert_as_exact_as(t, rough, true, 2 + i, ("y", "rows")[i])


def test_is_what_hugging_face_computes():
    """Qwen3's norm of each head, and Llama's rotation, of q and k."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    (rows, heads, cos, sin, weight, eps), _ = operands((6, 3, 8, 8), "both", torch.float64)
    norms = [Qwen3RMSNorm(8, eps) for _ in range(heads)]
    for norm, own in zip(norms, weight, strict=True):
        norm.weight.data = own
    q0, q1, k = (norm(x) for norm, x in zip(norms, rows[:, :24].split(8, 1), strict=True))
    q, k = torch.stack([q0, q1])[None], k[None, None]  # [B, H, S, Dh]
    q, k = apply_rotary_pos_emb(q, k, *(torch.cat([t, t], 1)[None] for t in (cos, sin)))
    expected = torch.cat([*q[0], k[0, 0], rows[:, 24:]], 1)
    # their statistics are fp32, whatever comes in
    torch.testing.assert_close(rotary(rows, heads, cos, sin, weight, eps), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", [lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]])
def test_non_contiguous_rows_are_changed_where_they_lie(strided, kind, implementation, device):
    (rows, *rest), dy = operands((9, 3, 6, 5), kind, torch.float64)
    rows, (expected, expected_grad) = strided(rows), results(written_out, (rows, *rest), dy)
    assert not rows.is_contiguous()
    with running(implementation, device, SANITIZERS):
        (_, grad) = results(on(device, on_a_copy), (rows, *rest), strided(dy))
        given = strided(rows.to(device))
        y = rotary(given, *moved(rest, device))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-8, atol=1e-8)
    assert y is given


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_what_lies_behind_the_heads_is_not_read(implementation, device):
    given, _ = operands((9, 3, 6, 5), "both", torch.float32)
    given[0][:, 18:] = float("nan")
    with running(implementation, device, SANITIZERS):
        y = on(device, rotary)(*given)
    assert y[:, :18].isfinite().all() and y[:, 18:].isnan().all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_gradient_that_comes_in_is_left_alone(implementation, device):
    given, dy = operands((9, 3, 6, 5), "both", torch.float32)
    before, given = dy.clone(), [t.to(device) if torch.is_tensor(t) else t for t in given]
    with running(implementation, device, SANITIZERS):
        results(on_a_copy, given, passed := dy.to(device))
    assert torch.equal(passed.cpu(), before)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_writes_over_what_a_product_of_samples_gave(implementation, device):
    """A view made inside of a Function may not be changed in place, and a product of `[B, T, K]` would be one."""
    (_, *given), dy = operands((6, 3, 8, 7), "both", torch.float64)
    shapes = (2, 3, 4), (31, 4), (2, 3, 1), (31, 1)
    h, weight, s, b = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)

    def turned(h, weight, s, b, *given):
        return rotary(linear_lowrank(h, weight, None, s, b, 1.0).flatten(0, 1), *given)

    def exact(h, weight, s, b, *given):
        return written_out((h @ weight.T + s @ b.T).flatten(0, 1), *given)

    def gradient(function):
        leaf = h.clone().requires_grad_()
        return torch.autograd.grad(function(leaf, weight, s, b, *given), leaf, dy)[0]

    with running(implementation, device):
        got = gradient(on(device, turned))
    torch.testing.assert_close(got, gradient(exact))


class Folded(torch.autograd.Function):
    """A Function whose result is a view."""

    @staticmethod
    def forward(ctx, rows):
        return rows.clone()[None]

    @staticmethod
    def backward(ctx, d_rows):
        return d_rows[0]


@pytest.mark.parametrize(
    "of_leaf",
    [
        lambda leaf: leaf,
        lambda leaf: leaf.view(6, -1),
        lambda leaf: leaf.repeat(1, 2).split(leaf.shape[1], dim=1)[0],
        lambda leaf: (leaf * 1).split(leaf.shape[1], 1)[0].view(leaf.shape),
        lambda leaf: Folded.apply(leaf).flatten(0, 1),
    ],
    ids=["a leaf", "a view of a leaf", "one of several views", "a view of that", "a view of a Function"],
)
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_rows_that_autograd_does_not_let_be_changed_are_copied(implementation, of_leaf, device):
    (rows, *given), dy = operands((6, 3, 8, 7), "both", torch.float64)

    def results(function, rows, given, dy):
        leaf = rows.clone().requires_grad_()
        result = function(leaf, *given)
        assert torch.equal(leaf, rows)
        return result.detach(), torch.autograd.grad(result, leaf, dy)[0]

    with running(implementation, device):
        got = results(lambda leaf, *given: rotary(of_leaf(leaf), *given), *moved((rows, given, dy), device))
    torch.testing.assert_close(moved(got, CPU), results(written_out, rows, given, dy))


def test_rows_that_share_their_memory_are_copied():
    (rows, *given), _ = operands((6, 3, 8, 7), "both", torch.float64)
    expected = written_out(rows[:1].expand(6, -1), *given)
    torch.testing.assert_close(rotary(rows[:1].expand(6, -1), *given), expected)


def test_backward_keeps_nothing_but_what_a_norm_needs(device):
    (rows, *rest), _ = operands((40, 3, 8, 8), "both", torch.float32)
    rows, cos, sin, weight = (t.to(device) for t in (rows, *rest[1:4]))
    rows.requires_grad_()
    frozen = [cos, sin, weight]
    assert saved_bytes(lambda: rotary(rows * 1, 3, cos, sin), frozen) == 0
    assert saved_bytes(lambda: rotary(rows * 1, 3, cos, sin, weight), frozen) == 40 * 24 * 4


def test_chunks_together_are_the_whole(monkeypatch, device):
    given, dy = operands((70, 2, 6, 3), "both", torch.float64)
    expected = results(written_out, given, dy)
    monkeypatch.setattr(chunks, "CHUNK_OF_CORE", 100)
    for got, exact in zip(computed("torch", device, given, dy), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, device):
    set_backend("torch")
    (rows, *rest), _ = operands((4, 2, 4, 3), kind, torch.float64)
    assert torch.autograd.gradcheck(lambda rows: on(device, on_a_copy)(rows, *rest), rows.requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, device):
    set_backend("torch")
    given, dy = operands((5, 3, 8, 7), kind, torch.float32)
    opcheck = on(device, torch.library.opcheck)
    for rows in (given[0], given[0].t().contiguous().t()):
        kept = None if given[4] is None else rows[:, :24].contiguous()
        opcheck(module.rotate.registered, (rows, *given[1:]))
        opcheck(module.rotate_backward.registered, (dy, kept, *given[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind, backend, device):
    set_backend("torch")
    given, dy = operands((6, 3, 8, 7), kind, torch.float32)
    torch.compiler.reset()  # all cases compile one function
    compiled = torch.compile(on_a_copy, fullgraph=True, backend=backend)
    expected = results(written_out, given, dy)
    for got, exact in zip(results(on(device, compiled), given, dy), expected, strict=True):
        torch.testing.assert_close(got, exact)
    with torch.no_grad():
        torch.testing.assert_close(on(device, compiled)(given[0].clone(), *given[1:]), expected[0])


COS = torch.ones(4, 3)


@pytest.mark.parametrize("rows, heads, given, message", [
    (torch.ones(4, 12), 2, {}, "cos and sin together, or weight"),
    (torch.ones(4, 12), 2, {"cos": COS}, "cos and sin together, or weight"),
    (torch.ones(4, 12), 3, {"cos": COS, "sin": COS}, "room for 3 heads"),
    (torch.ones(4, 12), 0, {"cos": COS, "sin": COS}, "room for 0 heads"),
    (torch.ones(2, 2, 12), 2, {"cos": COS, "sin": COS}, r"floating \[N, C\]"),
    (torch.ones(4, 12).int(), 2, {"cos": COS, "sin": COS}, r"floating \[N, C\]"),
    (torch.ones(4, 12), 2, {"weight": torch.ones(2, 5)}, "an even width"),
    (torch.ones(5, 12), 2, {"cos": COS, "sin": COS}, r"cos must be \[5, 3\]"),
    (torch.ones(4, 12), 2, {"cos": COS, "sin": COS[:3]}, r"sin must be \[4, 3\]"),
    (torch.ones(4, 12), 2, {"cos": COS, "sin": COS, "weight": torch.ones(2, 4)}, r"cos must be \[4, 2\]"),
    (torch.ones(4, 12), 2, {"weight": torch.ones(6)}, r"weight must be \[2, 6\]"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(rows, heads, given, message):
    with pytest.raises(ValueError, match=message):
        rotary(rows, heads, **given)
