"""Class tokens or proxies, their sum, and the alignment loss: every backend against plain PyTorch."""

import importlib

import pytest
import torch
from running import CPU, moved, on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import set_backend, substitute

module = importlib.import_module("u2a_fast.kernels.substitute")  # the package's attribute of that name is the function
IMPLEMENTATIONS = ("reference", "torch", "triton")
SANITIZERS = ("bounds", "races", "order")
# modalities, samples, width: of no block, several blocks, one modality, one column, no samples
SHAPES = [(2, 5, 7), (3, 35, 150), (1, 4, 3), (2, 17, 1), (2, 0, 8), (4, 3, 130)]


def operands(m, b, d, dtype=torch.float64, absent=float("nan"), seed=0):
    """Non-zero mean; the first sample has everything, the second (if any) nothing, the rest are random."""
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(b, m, generator=g) < 0.6
    present[:1], present[1:2] = True, False
    class_tokens = torch.randn(m, b, d, generator=g, dtype=torch.float64) + 1
    proxies = torch.randn(m, m, b, d, generator=g, dtype=torch.float64) + 0.5
    class_tokens[~present.t()] = absent
    proxies.masked_fill_(~present.t()[:, None, :, None], absent)
    proxies[torch.arange(m), torch.arange(m)] = absent  # the diagonal is unused
    return class_tokens.to(dtype), proxies.to(dtype), present


def results(class_tokens, proxies, present, stop_gradient, device):
    """fused, align and the gradients of a random combination of them."""
    leaves = class_tokens.detach().clone().requires_grad_(), proxies.detach().clone().requires_grad_()
    fused, align = on(device, substitute)(*leaves, present, stop_gradient)
    weight = torch.randn(fused.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    return fused.detach(), align.detach(), *torch.autograd.grad((fused.double() * weight).sum() + 2 * align, leaves)


def computed(implementation, device, *given):
    with running(implementation, device, SANITIZERS) as launched:
        got = results(*given, device)
    kernels = {"substitute_forward", "substitute_backward"}
    assert set(launched) == (kernels if implementation == "triton" and given[0].numel() else set())
    return got


def plain(*given):
    return computed("reference", CPU, *given)


def by_hand(class_tokens, proxies, present):
    """The formula, sample by sample."""
    m, b, _ = class_tokens.shape
    fused, align = torch.zeros_like(class_tokens[0]), torch.zeros((), dtype=class_tokens.dtype)
    for s in range(b):
        have = [i for i in range(m) if present[s, i]]
        for j in range(m):
            if j in have:
                fused[s] += class_tokens[j, s]
            elif have:
                fused[s] += sum(proxies[i, j, s] for i in have) / len(have)
    for i in range(m):
        for j in range(m):
            both = present[:, i] & present[:, j]
            if i != j and both.any():
                align = align + (proxies[i, j, both] - class_tokens[j, both]).square().mean()
    return fused, align


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula(shape, implementation, device):
    given = operands(*shape, absent=0.0)
    fused, align, *_ = computed(implementation, device, *given, True)
    expected = by_hand(*given)
    torch.testing.assert_close(fused, expected[0])
    torch.testing.assert_close(align, expected[1])


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_plain_pytorch(shape, implementation, stop_gradient, device):
    given = operands(*shape)
    got, expected = computed(implementation, device, *given, stop_gradient), plain(*given, stop_gradient)
    for t, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(t, exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_absent_rows_reach_nothing(implementation, dtype, device):
    shape = (3, 20, 33)
    nan, zero = (computed(implementation, device, *operands(*shape, dtype, a), False) for a in (float("nan"), 0.0))
    assert all(torch.equal(a, b) for a, b in zip(nan, zero, strict=True))
    present = operands(*shape)[2].t()
    _, _, d_class, d_proxies = nan
    assert not d_class[~present].any()
    assert not d_proxies.masked_select(~present[:, None, :, None]).any()
    assert not d_proxies[torch.arange(3), torch.arange(3)].any()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_plain_low_precision(implementation, dtype, device):
    """Plain: every step of the formula rounded to `dtype`, differentiated by autograd."""
    class_tokens, proxies, present = operands(2, 40, 100, dtype, absent=0.0)

    def plain(kind, device):
        c, p = class_tokens.to(kind).requires_grad_(), proxies.to(kind).requires_grad_()
        fused, align = on(device, by_hand)(c, p, present)
        weight = torch.randn(fused.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
        loss = (fused.double() * weight).sum() + 2 * align
        return fused.detach(), align.detach(), *torch.autograd.grad(loss, (c, p))

    low, exact = plain(dtype, device), plain(torch.float64, CPU)
    got = computed(implementation, device, class_tokens, proxies, present, False)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, dtype]
    for i, (t, rough, true) in enumerate(zip(got, low, exact, strict=True)):
        assert_as_exact_as(t, rough, true, 2 if i < 2 else 3, f"result {i}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nobody_has_two_modalities(implementation, device):
    """The loss is exactly 0 and still belongs to the graph."""
    class_tokens, proxies, _ = operands(2, 3, 4, absent=0.0)
    present = torch.tensor([[True, False], [False, True], [False, False]])
    fused, align, d_class, _ = computed(implementation, device, class_tokens, proxies, present, True)
    assert align == 0 and not fused[2].any() and torch.isfinite(d_class).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stop_gradient_spares_the_targets(implementation, device):
    given = operands(2, 6, 5, absent=0.0)
    leaves = given[0].requires_grad_(), given[1].requires_grad_()

    def class_gradient(stop_gradient):
        _, align = on(device, substitute)(*leaves, given[2], stop_gradient)
        return torch.autograd.grad(align, leaves[0], allow_unused=True, materialize_grads=True)[0]

    with running(implementation, device, SANITIZERS):
        stopped, free = class_gradient(True), class_gradient(False)
    assert not stopped.any() and free.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_non_contiguous_input_gives_the_same(implementation, device):
    given = operands(3, 6, 10)
    strided = (
        given[0].mT.contiguous().mT,
        given[1].transpose(0, 1).contiguous().transpose(0, 1),
        given[2].t().contiguous().t(),
    )
    assert not any(t.is_contiguous() for t in strided)
    for t, exact in zip(computed(implementation, device, *strided, False), plain(*given, False), strict=True):
        torch.testing.assert_close(t, exact)


@pytest.mark.slow
def test_results_do_not_depend_on_program_order(device):
    given = operands(3, 40, 300, torch.bfloat16)
    runs = []
    for seed in (0, 1, 2, 2):
        with running("triton", device, ("order",), seed):
            runs.append(results(*given, False, device))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_opcheck(stop_gradient, device):
    set_backend("torch")
    opcheck = on(device, torch.library.opcheck)
    class_tokens, proxies, present = operands(3, 4, 5, torch.float32, absent=0.0)
    given = class_tokens, proxies, present, stop_gradient
    opcheck(module.substitute_op.registered, given)
    for grads in ((torch.randn(4, 5), torch.tensor(2.0)), (None, torch.tensor(2.0)), (torch.randn(4, 5), None)):
        opcheck(module.substitute_backward_op.registered, (*grads, *given))


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_gradcheck_of_every_subset(which, device):
    set_backend("torch")
    given = operands(3, 4, 5, absent=0.0)
    leaves = [given[i].clone().requires_grad_() for i in which]

    def outputs(*values):
        tensors = dict(zip(which, values, strict=True))
        leaves = tensors.get(0, given[0]), tensors.get(1, given[1])
        return on(device, substitute)(*leaves, given[2], stop_gradient=False)

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.slow
def test_compile_and_export_see_one_op(device):
    set_backend("torch")
    given = moved(operands(2, 4, 5, torch.float32, absent=0.0), device)
    expected = substitute(*given)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return substitute(*tensors)

    for t, exact in zip(torch.compile(Module(), fullgraph=True, backend="aot_eager")(*given), expected, strict=True):
        torch.testing.assert_close(t, exact)
    nodes = [str(n.target) for n in torch.export.export(Module(), given).graph.nodes]
    assert nodes.count("u2a_fast.substitute.default") == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"class_tokens": torch.ones(0, 3, 4)}, ValueError, "M of at least 1"),
        ({"proxies": torch.ones(2, 2, 3, 5)}, ValueError, "proxies must be"),
        ({"present": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "present must be"),
        ({"present": torch.ones(3, 2)}, TypeError, "bool"),
        ({"proxies": torch.ones(2, 2, 3, 4).double()}, TypeError, "one floating point dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    given = {
        "class_tokens": torch.ones(2, 3, 4),
        "proxies": torch.ones(2, 2, 3, 4),
        "present": torch.ones(3, 2, dtype=torch.bool),
    }
    with pytest.raises(error, match=message):
        substitute(**given | change)


def test_under_autocast_the_wider_dtype_counts(device):
    class_tokens, proxies, present = moved(operands(2, 5, 7, torch.float32, absent=0.0), device)
    expected = substitute(class_tokens.bfloat16().float(), proxies, present)
    with torch.autocast(device.type, torch.bfloat16):
        got = substitute(class_tokens.bfloat16(), proxies, present)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, expected)  # to fp32's rounding; bf16's is a thousand times as coarse
    with pytest.raises(TypeError, match="one floating point dtype"):
        substitute(class_tokens.bfloat16(), proxies, present)
