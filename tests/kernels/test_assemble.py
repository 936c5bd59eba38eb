"""Learned rows, LayerNorm and the low-rank product in one pass: every backend against plain PyTorch."""

import importlib
import itertools

import pytest
import torch
from assemble_cases import LEARNED, SHAPES, clone, is_leaf, operands, outputs_and_gradients, weight_of
from int8_rows import assert_same_rows
from running import CPU, moved, on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import assemble, assemble_norm_project, quantize_rows, set_backend

module = importlib.import_module("u2a_fast.kernels.assemble")  # the package's attribute of that name is the function
SANITIZERS = ("bounds", "races", "order")


def plain(given, dtype, device=CPU):
    """The reference computed in `dtype` throughout."""
    with running("reference", device):
        return outputs_and_gradients(clone(given, dtype), on(device, assemble_norm_project))


def computed(given, implementation, device, function=assemble_norm_project):
    """outputs_and_gradients by "torch", or by "triton" under every sanitizer."""
    with running(implementation, device, SANITIZERS) as launched:
        result = outputs_and_gradients(clone(given), on(device, function))
    expected = implementation == "triton" and result["rows"].numel() > 0
    assert ("assemble_norm_project_forward" in launched) == expected
    return result


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name", SHAPES)
def test_float64_equals_plain_pytorch(name, implementation, device):
    given = operands(name, torch.float64, absent=7.0)
    expected, got = plain(given, torch.float64), computed(given, implementation, device)
    assert got.keys() == expected.keys()
    for what, exact in expected.items():
        if exact is None:
            assert got[what] is None, what
            continue
        torch.testing.assert_close(got[what], exact, rtol=1e-9, atol=1e-10, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["everything", "packed", "no learned rows", "no norm", "wide rank", "RMSNorm"])
def test_low_precision_is_as_exact_as_plain_low_precision(name, dtype, implementation, device):
    given = operands(name, dtype, absent=7.0)
    low, exact = plain(given, dtype, device), plain(given, torch.float64)
    got = computed(given, implementation, device)
    for what in exact:
        factor = 3 if what.startswith("d ") else 2
        assert got[what].dtype == (dtype if what in ("h", "s", "rows", "d tokens") else torch.float32), what
        assert_as_exact_as(got[what], low[what], exact[what], factor, what)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_statistics_are_fp32_where_rows_are_bf16(implementation, device):
    """Rows whose mean is a hundred times their spread: bf16 statistics would be wrong in the first digit."""
    rows = (100 + torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    given = {"tokens": rows, "norm_weight": torch.ones(256), "norm_bias": torch.zeros(256)}
    exact = torch.nn.functional.layer_norm(rows.double(), (256,))
    with running(implementation, device):
        h = on(device, assemble_norm_project)(**given)[0]
    assert_as_exact_as(h, exact.bfloat16(), exact, 1.5, "h")


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name", ["everything", "no norm"])
def test_absent_tokens_are_never_used(name, implementation, device):
    given = (operands(name, torch.bfloat16, absent=absent) for absent in (float("nan"), 0.0))
    nan, zero = (computed(each, implementation, device) for each in given)
    for what, t in zero.items():
        assert torch.equal(nan[what], t), what
    absent = ~operands(name, torch.bfloat16)["present"]
    assert torch.equal(nan["d tokens"][absent], torch.zeros_like(nan["d tokens"][absent]))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_packed_tokens_give_the_same_as_unpacked(implementation, device):
    full = operands("everything", torch.float32, absent=9.0)
    packed = full | {"tokens": full["tokens"].detach()[full["present"]].requires_grad_()}
    a, b = computed(full, implementation, device), computed(packed, implementation, device)
    a["d tokens"] = a["d tokens"][full["present"]]
    for what, t in a.items():
        torch.testing.assert_close(b[what], t)


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_non_contiguous_input_gives_the_same(implementation, device):
    given = operands("everything", torch.float32, absent=9.0)
    leaves = {n: t.detach() for n, t in given.items() if is_leaf(t)}
    strided = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in leaves.items()}
    strided = given | {n: t.requires_grad_() for n, t in strided.items()}
    assert not strided["tokens"].is_contiguous()
    with running(implementation, device, SANITIZERS):
        got = outputs_and_gradients(strided, on(device, assemble_norm_project))
    for what, exact in plain(given, torch.float64).items():
        torch.testing.assert_close(got[what].double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_int8_rows_are_those_of_h_and_change_nothing_else(name, dtype, implementation, device):
    given = operands(name, dtype, absent=0.0)
    expected = computed(given, implementation, device)
    rows = []

    def quantizing(**given):
        h, s, assembled = on(device, assemble_norm_project)(**given, quantize=True)
        rows.append((h.q, h.scale))
        return h.like, s, assembled

    got = computed(given, implementation, device, quantizing)
    h = expected.pop("h")
    like, (q, scale) = got.pop("h"), rows.pop()
    assert like.shape == h.shape and like.dtype == h.dtype
    assert_same_rows((q.flatten(0, 1), scale), quantize_rows(h.flatten(0, 1)), device)
    if dtype == torch.float32:  # in bf16 the two round gradients at different places where h is the rows
        for what, t in expected.items():
            torch.testing.assert_close(got[what], t, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_assemble_joins_rows_in_order(implementation, device):
    tokens, prefix, suffix = torch.ones(2, 2, 1), torch.zeros(1, 1), torch.full((1, 1), 3.0)
    present, mask_token = torch.tensor([True, False]), torch.tensor([2.0])
    expected = torch.tensor([[0.0, 1, 1, 3], [0, 2, 2, 3]])
    with running(implementation, device):
        assembled = on(device, assemble)
        assert torch.equal(assembled(tokens, prefix, suffix, present, mask_token)[..., 0], expected)
        assert torch.equal(assembled(tokens[:1], prefix, suffix, present, mask_token)[..., 0], expected)
        assert assembled(tokens, present=present)[1].abs().max() == 0  # without a mask token: zeros


# ------------------------------------------------------------------------------------------------- what is not written
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_equal_results_are_one_tensor(implementation, device):
    set_backend(implementation)
    tokens, weight, prefix, lora_a = moved((torch.randn(2, 3, 8), *map(torch.ones, (8, (1, 8), (2, 8)))), device)
    assert assemble(tokens) is tokens
    h, s, rows = assemble_norm_project(tokens=tokens, lora_a=lora_a)
    assert h is tokens and rows is tokens and s.shape == (2, 3, 2)
    h, s, rows = assemble_norm_project(tokens=tokens, norm_weight=weight)
    assert rows is tokens and s is None and h is not tokens
    h, _, rows = assemble_norm_project(tokens=tokens, prefix=prefix)
    assert h is rows and rows.shape == (2, 4, 8)
    rows = assemble_norm_project(tokens=tokens.requires_grad_(), norm_weight=weight)[2]
    assert rows.data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("name, statistics", [("everything", 8), ("RMSNorm", 4)])
def test_backward_keeps_no_normalised_rows(name, statistics, device):
    """Bytes kept: the assembled rows, their statistics, and the parameters."""
    given = moved(operands(name, torch.bfloat16, absent=0.0), device)
    set_backend("torch")
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        _, s, rows = assemble_norm_project(**given)
    parameters = [given[n] for n in ("norm_weight", "norm_bias", "lora_a", "present")]
    parameters = sum(t.nbytes for t in parameters if t is not None)
    assert sum(t.nbytes for t in kept.values()) == rows.nbytes + parameters + statistics * s.shape[0] * s.shape[1]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name, sizes", [("everything", (1, 6)), ("no norm", (1, 2, 3)), ("RMSNorm", (1,))])
def test_frozen_inputs_get_no_gradient(name, sizes, implementation, device):
    """Subsets of what may train, by their sizes."""
    full = operands(name, torch.float64, absent=0.0)
    names = [n for n in ("tokens", *LEARNED) if full[n] is not None]
    expected = plain(full, torch.float64)
    for subset in itertools.chain(*(itertools.combinations(names, size) for size in sizes)):
        given = clone(full)
        for n in set(names) - set(subset):
            given[n] = given[n].detach()
        with running(implementation, device):
            got = outputs_and_gradients(given, on(device, assemble_norm_project))
        assert {n[2:] for n in got if n.startswith("d ")} == set(subset)
        for n in subset:
            torch.testing.assert_close(got[f"d {n}"], expected[f"d {n}"])


# ---------------------------------------------------------------------------------------------------------- torch rules
def arguments(name, dtype, out_dtype=None, quantize=False):
    """Of the op, from the public function's."""
    t = operands(name, dtype, absent=0.0)
    order = ("tokens", "prefix", "suffix", "present", "mask_token", "norm_weight", "norm_bias", "lora_a")
    return *(None if t[n] is None else t[n].detach() for n in order), 1e-5, t["rms"], out_dtype or dtype, quantize


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_opcheck(name, quantize, device):
    set_backend("torch")
    given = arguments(name, torch.float32, quantize=quantize)
    on(device, torch.library.opcheck)(module.assemble_forward.registered, given)


@pytest.mark.slow
def test_opcheck_of_mixed_dtypes_and_of_backward(device):
    set_backend("torch")
    opcheck, backward = on(device, torch.library.opcheck), module.assemble_backward.registered
    opcheck(module.assemble_forward.registered, arguments("everything", torch.float32, torch.bfloat16))
    g, stats = torch.randn(4, 10, 40), torch.rand(40)
    given = arguments("everything", torch.float32)
    tail = *(t.detach() for t in given[5:8]), given[3], 4, 2, 7, 1e-5, torch.float32
    low = torch.randn(4, 10, 6)
    opcheck(backward, (g, g.clone(), low, g.clone(), stats, stats + 1, *tail, [True] * 7))
    rms = g, g.clone(), low, g.clone(), None, stats + 1, given[5].detach(), None, *tail[2:]
    opcheck(backward, (*rms, [True] * 5 + [False, True]))
    opcheck(backward, (g, *[None] * 9, 4, 0, 10, 1e-5, torch.float32, [True] + [False] * 6))


@pytest.mark.parametrize("name", ["everything", "packed", "no norm", "no rank", "RMSNorm"])
def test_gradcheck(name, device):
    set_backend("torch")
    given = operands(name, torch.float64, absent=0.0)
    leaves = {n: t for n, t in given.items() if is_leaf(t)}

    def outputs(*values):
        results = on(device, assemble_norm_project)(**given | dict(zip(leaves, values, strict=True)))
        return tuple(t for t in results if t is not None)

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["everything", "no learned rows", "RMSNorm"])
def test_compile_and_export_see_one_op(name, device):
    set_backend("torch")
    given = clone(moved(operands(name, torch.float32, absent=0.0), device))
    expected = outputs_and_gradients(given, on(device, assemble_norm_project))

    class Module(torch.nn.Module):
        def forward(self, tokens):
            return assemble_norm_project(**given | {"tokens": tokens})

    compiled = on(device, torch.compile(Module(), fullgraph=True, backend="aot_eager"))(given["tokens"])
    for t, what in zip(compiled, ("h", "s", "rows"), strict=True):
        torch.testing.assert_close(t, expected[what])
    (grad,) = torch.autograd.grad(
        sum((t.double() * weight_of(n, t)).sum() for n, t in zip(("h", "s", "rows"), compiled, strict=True)),
        given["tokens"],
    )
    torch.testing.assert_close(grad, expected["d tokens"])
    nodes = [str(n.target) for n in torch.export.export(Module(), (given["tokens"],)).graph.nodes]
    assert nodes.count("u2a_fast.assemble_norm_project.default") == 1


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_residual_alone(dtype, implementation, device):
    set_backend(implementation)
    given = operands("everything", torch.float32, absent=0.0)
    assembled = on(device, assemble_norm_project)
    with torch.autocast(device.type, dtype=dtype):
        h, s, rows = assembled(**given)
        plain_h, plain_s, plain_rows = assembled(tokens=given["tokens"], lora_a=given["lora_a"])
    assert (h.dtype, s.dtype, rows.dtype) == (dtype, dtype, torch.float32)
    assert (plain_h.dtype, plain_s.dtype) == (dtype, dtype) and plain_rows.dtype == torch.float32
    grads = torch.autograd.grad(h.sum() + s.sum() + rows.sum(), [given["tokens"], given["lora_a"]])
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": torch.ones(2, 3)}, ValueError, r"\[B, S, D\]"),
        ({"prefix": torch.ones(2, 7)}, ValueError, "prefix must be"),
        ({"mask_token": torch.ones(1, 8)}, ValueError, "mask_token must be"),
        ({"present": torch.ones(3)}, TypeError, "bool"),
        ({"present": torch.tensor([True, True, True])}, ValueError, "2 samples, which is neither all 3"),
        ({"norm_bias": torch.ones(8)}, ValueError, "without norm_weight"),
        ({"norm_weight": torch.ones(8), "norm_bias": torch.ones(8), "rms": True}, ValueError, "RMSNorm has no bias"),
        ({"lora_a": torch.ones(0, 8)}, ValueError, "lora_a must have"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        assemble_norm_project(**{"tokens": torch.ones(2, 3, 8)} | change)


# ------------------------------------------------------------------------------------------------------------- kernels
@pytest.mark.slow
def test_gradients_do_not_depend_on_program_order(device):
    given = operands("everything", torch.bfloat16)
    results = []
    for seed in (0, 1, 2, 2):
        with running("triton", device, ("order",), seed) as launched:
            results.append(outputs_and_gradients(clone(given), on(device, assemble_norm_project)))
    assert launched.count("assemble_norm_project_backward") == 1
    for other in results[1:]:
        assert all(torch.equal(other[what], t) for what, t in results[0].items())
