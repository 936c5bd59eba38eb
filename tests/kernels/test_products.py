"""Products on CPUs that have a faster way than PyTorch's: half precision in fp32 copies, large fp32 ones oneDNN's."""

import gc

import pytest
import torch
from block_cases import BATCH, ROWS, WIDTH, halves, see
from linear_cases import CASES, assert_right, operands, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from u2a_fast.kernels import (
    Group,
    Half,
    attention,
    attention_rows,
    linear_lowrank,
    lora_linear,
    nf4_linear,
    pack_nf4,
    products,
    transformer_block,
)
from u2a_fast.kernels.linear_backward import low_rank_backward
from u2a_fast.memory import saved_bytes

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_linear_pointwise"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu_backward"}  # its forward takes as long in bf16 as in fp32


@pytest.fixture
def old_cpu(monkeypatch):
    """A CPU without AVX-512."""
    monkeypatch.setattr(products, "multiplied_by_cpu", lambda dtype: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


class NoHalfProducts(TorchDispatchMode):
    """Fails at a product of bf16 or fp16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        low = any(isinstance(a, torch.Tensor) and a.dtype in HALF for a in args)
        assert not (low and func.overloadpacket.__name__ in PRODUCTS), f"{func} of half precision"
        return func(*args, **(kwargs or {}))


def several(*shape, dtype):
    return torch.randn(2, *shape).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_product_is_rounded_once(dtype, transposed, old_cpu):
    a, c = several(7, 33, dtype=dtype), several(7, 5, dtype=dtype)
    b = several(5, 33, dtype=dtype).transpose(1, 2) if transposed else several(33, 5, dtype=dtype)
    ab, bias = a.double() @ b.double(), torch.randn(5).to(dtype)
    found = {
        "mm": (products.mm(a[0], b[0]), ab[0]),
        "bmm": (products.bmm(a, b), ab),
        "addmm": (products.addmm(c[0], a[0], b[0], alpha=0.5), c[0].double() + 0.5 * ab[0]),
        "addmm, beta 0": (products.addmm(c[0] * torch.nan, a[0], b[0], beta=0, alpha=0.5), 0.5 * ab[0]),
        "addmm_": (products.addmm_(c[0].clone(), a[0], b[0], 0.5), c[0].double() + 0.5 * ab[0]),
        "baddbmm": (products.baddbmm(c, a, b, alpha=0.5), c.double() + 0.5 * ab),
        "baddbmm, beta 0": (products.baddbmm(c * torch.nan, a, b, beta=0, alpha=0.5), 0.5 * ab),
        "baddbmm_": (products.baddbmm_(c.clone(), a, b, 0.5), c.double() + 0.5 * ab),
        "linear": (products.linear(a, b[0].t(), bias), a.double() @ b[0].double() + bias.double()),
    }
    for name, (got, exact) in found.items():
        assert got.dtype == dtype, name
        once = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5
        assert ((got.double() - exact).abs() <= once).all(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.dropout])
def test_a_linear_leaves_no_product_in_half_precision_and_is_as_exact(name, dtype, old_cpu):
    given = operands(CASES[name], dtype)
    with NoHalfProducts():
        got = with_gradients(lora_linear, given)
    assert_right(got, given, dtype, None)


def test_a_frozen_linear_neither(old_cpu):
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(4, 8).bfloat16(), torch.randn(4).bfloat16()
    with NoHalfProducts():
        lora_linear(x, weight, bias, None, None, 1.0).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).bfloat16().expand(3, -1))


@pytest.mark.parametrize("given", ["s", "lora_a"])
def test_nor_one_of_four_bits(given, old_cpu):
    shapes = {"x": (3, 64), "s": (3, 2), "lora_a": (2, 64), "lora_b": (8, 2)}
    leaves = {n: torch.randn(shapes[n]).bfloat16().requires_grad_() for n in ("x", given, "lora_b")}
    packed = pack_nf4(torch.randn(8, 64))

    def grads(dtype):
        low = {n: t.to(dtype) for n, t in leaves.items()}
        y = nf4_linear(low.pop("x"), *packed, (8, 64), **low)
        return torch.autograd.grad(y.float().square().sum(), list(leaves.values()))

    with NoHalfProducts():
        found = grads(torch.bfloat16)
    for got, expected in zip(found, grads(torch.float32), strict=True):
        assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nor_attention(dtype, old_cpu):
    q, k, v = (torch.randn(1, 2, 800, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    rows = torch.randn(800, 48, dtype=dtype, requires_grad=True)
    with NoHalfProducts():
        attention(q, k, v).sum().backward()
        attention_rows(rows, None, 2, [Group(1, 800, 800)])[0].sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v, rows))


@pytest.mark.parametrize("product", ["mm", "bmm"])
def test_operands_of_two_dtypes_are_refused_as_elsewhere(product, old_cpu):
    a = torch.ones(2, 2, 2, dtype=torch.bfloat16)[0 if product == "mm" else slice(None)]
    with pytest.raises(RuntimeError, match=r"one dtype, not torch.bfloat16 and torch.float32"):
        getattr(products, product)(a, a.float())


def narrow(part):
    if torch.is_tensor(part):
        low = part.detach().to(torch.bfloat16 if part.is_floating_point() else part.dtype)
        return low.requires_grad_(part.requires_grad)
    return type(part)(*map(narrow, part)) if isinstance(part, tuple) else part


@pytest.mark.parametrize(
    "options", [{}, {"pre_norm": False}, {"gated": True}, {"kv_heads": 1}, {"int8": True}], ids=str
)
def test_a_block_leaves_none_and_keeps_the_same_bytes(options, old_cpu, monkeypatch):
    attention, mlp = (Half(*map(narrow, half)) for half in halves(**options))
    x = torch.randn(BATCH, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    given = x, attention, mlp, see(kv_heads=options.get("kv_heads", 2)), "gated_silu" if "gated" in options else "gelu"
    leaves = [x, *(t for t in (*attention.trained, *mlp.trained) if t is not None)]

    def grads():
        return torch.autograd.grad(transformer_block(*given).float().square().sum(), leaves)

    with NoHalfProducts():
        in_fp32, kept = grads(), saved_bytes(lambda: transformer_block(*given))
    monkeypatch.setattr(products, "multiplied_by_cpu", lambda dtype: True)
    assert saved_bytes(lambda: transformer_block(*given)) == kept
    for got, expected in zip(in_fp32, grads(), strict=True):
        assert (got - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 5, 2), (7, 33, 5), (2, 1024, 3), (3, 5000, 4)])
def test_int8_products_are_exact(shape):
    m, k, n = shape
    a, b = torch.full((m, k), -128, dtype=torch.int8), torch.full((k, n), -128, dtype=torch.int8)
    b[::2] = torch.randint(-128, 128, b[::2].shape, dtype=torch.int8)
    for rows in (a, torch.randint(-128, 128, a.shape, dtype=torch.int8)):
        assert torch.equal(products.int8_mm(rows, b), (rows.long() @ b.long()).int())


# ------------------------------------------------------------------------------------------------ fp32 without AVX-512
class Called(TorchDispatchMode):
    """The names of all ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def onednn(monkeypatch):
    """A CPU whose fp32 products oneDNN is asked for, whichever this is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)


def assert_exact(got, exact):
    torch.testing.assert_close(got.double(), exact, atol=2e-5 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("bias", [None, "dense", "strided"])
@pytest.mark.parametrize("shape", [(257, 387, 515), (4, 65, 512, 384)], ids=str)
def test_a_large_product_in_fp32_is_onednns(shape, bias, onednn):
    *rows, k, n = shape
    x, weight = torch.randn(*rows, k), torch.randn(n, k)
    bias = None if bias is None else torch.randn(n) if bias == "dense" else torch.randn(n, 2)[:, 0]
    with Called() as called:
        got = products.linear(x, weight, bias)
    assert called.names[-1:] == ["_linear_pointwise"]
    assert_exact(got, torch.nn.functional.linear(*(t if t is None else t.double() for t in (x, weight, bias))))


@pytest.mark.parametrize("n", [300, 515])
def test_a_gradient_of_many_rows_goes_through_the_weight_turned(n, onednn):
    dy, weight = torch.randn(products.MANY, n), torch.randn(n, 530)
    with Called() as called:
        got = products.through(dy, weight)
    assert called.names[-1:] == ["_linear_pointwise"]
    assert_exact(got, dy.double() @ weight.double())


def frozen(*shape):
    return torch.nn.Parameter(torch.randn(*shape), requires_grad=False)


def test_within_the_context_a_frozen_weight_is_turned_once_whatever_the_rows(onednn):
    dy, weight, trained = torch.randn(300, 515), frozen(515, 520), torch.nn.Parameter(torch.randn(515, 520))
    turns = []
    with torch.no_grad(), products.keep_turned_weights():
        for given in (weight, weight, trained, trained):
            with Called() as called:
                got = products.through(dy, given)
            assert_exact(got, dy.double() @ given.double())
            turns.append("copy_" in called.names)
            assert (called.names[-1] == "_linear_pointwise") == (given is weight)
    assert turns == [True, False, False, False]
    with Called() as called:
        products.through(dy, weight)
    assert called.names == ["mm"]


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "data in place": lambda weight: weight.data.mul_(2),
    "a row of data": lambda weight: weight.data[-1].mul_(2),
    "a column of data": lambda weight: weight.data[:, -1].mul_(2),
    "other data": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(515, 520), (300, 530), (1100, 515)], ids=str)
def test_a_weight_that_has_changed_is_turned_anew(shape, change, onednn):
    dy, weight = torch.randn(300, shape[0]), frozen(*shape)
    with torch.no_grad(), products.keep_turned_weights():
        products.through(dy, weight)
        CHANGES[change](weight)
        assert_exact(products.through(dy, weight), dy.double() @ weight.double())


def test_nothing_is_kept_of_weights_that_are_gone_nor_behind_the_outermost_context(onednn):
    dy, weight = torch.randn(300, 515), frozen(515, 520)
    with torch.no_grad(), products.keep_turned_weights():
        with products.keep_turned_weights():
            products.through(dy, weight)
        assert len(products._kept) == 1
        del weight
        gc.collect()
        assert len(products._kept) == 0
    assert products._kept is None


def test_weights_of_inference_mode_are_turned_too(onednn):
    dy = torch.randn(300, 515)
    with torch.inference_mode(), products.keep_turned_weights():
        weight = frozen(515, 520)
        for _ in range(2):
            assert_exact(products.through(dy, weight), dy.double() @ weight.double())


def test_few_rows_strides_and_other_dtypes_are_multiplied_all_the_same(onednn):
    weight = torch.randn(2 * 300, 530)[::2]
    for rows, dtype in ((3, torch.float32), (products.MANY, torch.float32), (products.MANY, torch.float64)):
        dy, w = torch.randn(rows, 2 * 300, dtype=dtype)[:, ::2], weight.to(dtype)
        assert_exact(products.through(dy, w).to(dtype), dy.double() @ w.double())


def test_what_is_recorded_or_traced_stays_pytorchs(onednn):
    x, weight = torch.randn(300, 400, requires_grad=True), torch.randn(500, 400)
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(300, -1), atol=1e-3, rtol=1e-4)
    graphs = []
    traced = torch.compile(lambda x: products.linear(x, weight), backend=lambda g, _: graphs.append(g) or g)
    torch.testing.assert_close(traced(x.detach()), torch.nn.functional.linear(x.detach(), weight))
    names = {node.name for node in graphs[0].graph.nodes}
    assert "linear" in names and not any("pointwise" in name for name in names)


@pytest.mark.parametrize("function", [lora_linear, linear_lowrank])
def test_a_large_frozen_linear_takes_it_both_ways_and_is_differentiated(function, onednn):
    x, weight, bias = torch.randn(300, 515, requires_grad=True), frozen(400, 515), frozen(400)
    with Called() as called, products.keep_turned_weights():
        function(x, weight, bias, None, None, 1.0).square().sum().backward()
    assert called.names.count("_linear_pointwise") == 2
    y = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_exact(x.grad, 2 * y @ weight.double())


def test_operands_of_two_dtypes_are_no_product_of_onednns(onednn):
    with pytest.raises(RuntimeError, match="dtype"):
        products.linear(torch.ones(300, 400), torch.ones(500, 400, dtype=torch.float64))


@pytest.mark.parametrize("rank", [8, 9])
def test_groups_of_a_low_rank_have_their_own_gradients(rank):
    rows, groups, width = 70, 3, 20
    dy, s, b = torch.randn(rows, groups * width), torch.randn(rows, groups * rank), torch.randn(groups * width, rank)
    g, db = low_rank_backward(dy, s, b, 0.5, groups, 1)
    for i in range(groups):
        own, low = slice(i * width, (i + 1) * width), slice(i * rank, (i + 1) * rank)
        assert_exact(g[:, low], dy[:, own].double() @ b[own].double())
        assert_exact(db[own], 0.5 * dy[:, own].double().t() @ s[:, low].double())
