"""lora_linear and linear_lowrank: every backend against the formula, and what they keep, refuse and register."""

import itertools

import pytest
import torch
from linear_cases import CASES, SEED, Case, assert_right, lowrank_operands, operands, with_gradients
from running import CPU, moved, on, running, skip_wide_tiles

from u2a_fast.kernels import QuantizedRows, linear_lowrank, lora_linear, quantize_rows
from u2a_fast.kernels.dropout import kept

DTYPES = (torch.float32, torch.bfloat16)
IMPLEMENTATIONS = ("reference", "torch", "triton")
OPS = torch.ops.u2a_fast


def mask_of(case):
    """The dropout mask of a case, in the shape of x."""
    if not case.dropout:
        return None
    return kept(torch.Size(case.lead).numel(), case.k, case.dropout, torch.tensor(SEED)).view(*case.lead, case.k)


def computed(function, given, implementation, device, sanitizers=("bounds", "order"), seed=0):
    with running(implementation, device, sanitizers, seed) as launched:
        result = with_gradients(on(device, function), given)
    fused = given["lora_b"] is not None or given["weight_scale"] is not None
    expected = implementation == "triton" and fused and result["y"].numel() > 0
    assert ("linear_lowrank_forward" in launched) == expected
    return result


# --------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_lora_linear_is_as_exact_as_plain_low_precision(name, implementation, dtype, device):
    case = CASES[name]
    given = operands(case, dtype)
    assert_right(computed(lora_linear, given, implementation, device), given, dtype, mask_of(case), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.r and not case.dropout])
def test_linear_lowrank_is_as_exact_as_plain_low_precision(name, implementation, dtype, device):
    given = lowrank_operands(CASES[name], dtype)
    assert_right(computed(linear_lowrank, given, implementation, device), given, dtype, device=device)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_int8_rows_from_an_earlier_pass_give_the_same(implementation, adapted, device):
    given = lowrank_operands(CASES["w8a8"], torch.bfloat16)
    if not adapted:
        given |= {"s": None, "lora_b": None}
    expected = computed(linear_lowrank, given, implementation, device)
    with running(implementation, device):
        q, scale = on(device, quantize_rows)(given["h"].flatten(0, -2))

    def from_rows(h, quantize_input, **rest):
        like = h if implementation == "reference" else h - h.detach()  # the gradient of h, not its values
        return on(device, linear_lowrank)(QuantizedRows(like, q.view(h.shape), scale), **rest)

    got = computed(from_rows, given, implementation, device)
    for name, exact in expected.items():
        assert torch.equal(got[name], exact), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_is_as_exact_as_plain_float16(implementation, device):
    given = operands(CASES["q, k, v"], torch.float16)
    assert_right(computed(lora_linear, given, implementation, device), given, torch.float16, device=device)


@pytest.mark.parametrize("name", ["q, k, v", "q twice as wide", "dropout", "int8", "w8a8"])
def test_no_two_programs_of_a_launch_meet_at_an_address(name):
    case = CASES[name]
    given = operands(case, torch.float32)
    got = computed(lora_linear, given, "triton", CPU, ("bounds", "races"))
    assert_right(got, given, torch.float32, mask_of(case))


@pytest.mark.slow
def test_triton_results_are_bitwise_equal_for_every_order_of_programs(device):
    given = operands(Case(lead=(150,), k=72, n=600, r=8, groups=3, wide=2), torch.float32)
    runs = [computed(lora_linear, given, "triton", device, ("order",), seed) for seed in (1, 2, 3)]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]) and torch.equal(runs[0][name], runs[2][name]), name


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_adapters_share_survives_bfloat16_while_it_is_tiny(implementation, device):
    """The slope of (y - y without adapter) on the exact adapter output is 1; folding B A into the weight loses it."""
    given = operands(Case(lead=(320,), k=256, n=256, r=16, bias=False), torch.bfloat16)
    a = given["lora_a"].detach()
    b = given["lora_b"].detach() * 3e-4
    x, w = given["x"].detach().double(), given["weight"].double()
    base, delta = x @ w.t(), given["scaling"] * x @ a.double().t() @ b.double().t()
    y = computed(lora_linear, given | {"lora_b": b.requires_grad_()}, implementation, device)["y"].double()
    folded = (w + given["scaling"] * b.double() @ a.double()).bfloat16().double()

    def slope(out):
        return (((out - base) * delta).sum() / delta.square().sum()).item()

    assert abs(slope(y) - 1) < 0.05
    assert abs(slope((x @ folded.t()).bfloat16().double()) - 1) > 0.2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quantised_rows_differ_from_the_exact_product_by_at_most_half_a_step_per_element(implementation, device):
    given = operands(Case(lead=(19,), k=72, n=96, r=None, weight="w8a8", bias=False), torch.float32)
    x, w = given["x"].detach().double(), given["weight"].double() * given["weight_scale"].double()[:, None]
    error = (computed(lora_linear, given, implementation, device)["y"].double() - x @ w.t()).abs()
    half_step = x.abs().amax(1, keepdim=True) / 127 / 2
    assert (error <= half_step * w.abs().sum(1) * (1 + 1e-5)).all()
    assert error.max() > 0


# ------------------------------------------------------------------------------------------------------------- autograd
def subsets(given, names):
    """`given` with every non-empty subset of `names` requiring gradients."""
    for chosen in itertools.product((False, True), repeat=len(names)):
        if any(chosen):
            leaves = {n: given[n].detach().requires_grad_(c) for n, c in zip(names, chosen, strict=True)}
            yield given | leaves, [n for n, c in zip(names, chosen, strict=True) if c]


def check_gradients(function, given, leaves, implementation, device):
    """gradcheck for every subset of the leaves; where a call is slow, of one, all and all but one, and projected."""
    skip_wide_tiles(implementation, device)
    fast = implementation == "triton" or device != CPU
    for chosen, names in subsets(given, leaves):
        if fast and 1 < len(names) < len(leaves) - 1:
            continue

        def by_position(*tensors, chosen=chosen, names=names):
            return on(device, function)(**chosen | dict(zip(names, tensors, strict=True)))

        tensors = [chosen[n] for n in names]
        with running(implementation, device, ()):
            assert torch.autograd.gradcheck(by_position, tensors, fast_mode=fast), names


@pytest.mark.slow
@pytest.mark.parametrize("dropped, wide", [(0.0, 1), (0.0, 3), (0.4, 1)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lora_linears_gradients_hold_in_float64_whichever_leaves_have_them(implementation, dropped, wide, device):
    given = operands(Case(lead=(2, 2), k=3, n=4, r=2, groups=2, wide=wide, dropout=dropped), torch.float64)
    check_gradients(lora_linear, given, ("x", "weight", "bias", "lora_a", "lora_b"), implementation, device)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_linear_lowranks_gradients_hold_in_float64_whichever_leaves_have_them(implementation, wide, device):
    given = lowrank_operands(Case(lead=(3,), k=3, n=4, r=2, groups=2, wide=wide), torch.float64)
    check_gradients(linear_lowrank, given, ("h", "weight", "bias", "s", "lora_b"), implementation, device)


def test_gradients_carry_the_dtype_of_their_leaves(device):
    given = operands(CASES["q, k, v"], torch.bfloat16)
    got = with_gradients(on(device, lora_linear), given)
    assert got["y"].dtype == got["d x"].dtype == torch.bfloat16
    assert got["d lora_a"].dtype == got["d lora_b"].dtype == got["d bias"].dtype == torch.float32


def saved(function, given):
    """Names of the operands, and shapes of other tensors, that autograd keeps."""
    owners = {t.untyped_storage().data_ptr(): n for n, t in given.items() if torch.is_tensor(t) and t.numel()}
    kept_tensors = []

    def pack(t):
        kept_tensors.append(owners.get(t.untyped_storage().data_ptr(), tuple(t.shape)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(**given)
    assert y.requires_grad
    return set(kept_tensors)


def test_lora_linear_keeps_x_and_s_and_no_dropout_mask(device):
    case = Case(lead=(9,), r=6, dropout=0.5)
    given = moved(operands(case, torch.float32), device)
    assert saved(lora_linear, given | {"dropout": 0.0}) == {"x", "weight", "lora_a", "lora_b", (9, 6)}
    assert saved(lora_linear, given) == {"x", "weight", "lora_a", "lora_b", (9, 6), ()}  # (): the seed


def test_a_frozen_linear_keeps_its_weight_alone(device):
    given = moved(operands(Case(r=None), torch.float32) | {"bias": None}, device)
    assert saved(lora_linear, given) == {"weight"}
    int8 = moved(operands(Case(r=None, weight="int8"), torch.float32), device)
    assert saved(lora_linear, int8) == {"weight", "weight_scale"}


def test_nothing_below_means_the_weight_is_not_kept_and_x_only_for_a(device):
    given = moved(operands(Case(lead=(9,)), torch.float32), device)
    given["x"] = given["x"].detach()
    assert saved(lora_linear, given) == {"x", "lora_a", "lora_b", (9, 6)}
    assert saved(lora_linear, given | {"lora_a": given["lora_a"].detach()}) == {"lora_b", (9, 6)}


def test_linear_lowrank_does_not_keep_h(device):
    given = moved(lowrank_operands(Case(), torch.float32), device)
    assert saved(linear_lowrank, given) == {"weight", "lora_b", "s"}
    trained = given | {"weight": given["weight"].clone().requires_grad_()}
    assert "h" in saved(linear_lowrank, trained)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_operand_changes(implementation, device):
    given = moved(operands(CASES["int8, dropout"], torch.bfloat16), device)
    before = {n: t.detach().clone() for n, t in given.items() if torch.is_tensor(t)}
    computed(lora_linear, given, implementation, device)
    for name, t in before.items():
        assert torch.equal(given[name], t), name


# ------------------------------------------------------------------------------------------------- dispatcher, compiler
def op_arguments(case, dtype=torch.float32):
    given = operands(case, dtype)
    seed = torch.tensor(SEED) if case.dropout else None
    names = ("x", "weight", "bias", "lora_a", "lora_b", "scaling", "weight_scale", "groups", "lead", "dropout")
    return (*(detached(given[n]) for n in names), seed, given["quantize_input"])


def detached(value):
    return value.detach() if torch.is_tensor(value) else value


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["q, k, v", "q twice as wide", "no rows", "no adapter", "strided", "dropout", "int8", "w8a8"]
)
def test_opcheck_passes_for_lora_linear(name, device):
    on(device, torch.library.opcheck)(OPS.lora_linear, op_arguments(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q, k, v", "q twice as wide", "no rows", "strided", "int8", "w8a8"])
def test_opcheck_passes_for_linear_lowrank(name, device):
    given = lowrank_operands(CASES[name], torch.float32)
    names = ("h", "weight", "bias", "s", "lora_b", "scaling", "weight_scale", "groups", "lead", "quantize_input")
    given, opcheck = {n: detached(t) for n, t in given.items()}, on(device, torch.library.opcheck)
    q, scale = quantize_rows(given["h"].flatten(0, -2)) if given["quantize_input"] else (None, None)
    opcheck(OPS.linear_lowrank, (*(given[n] for n in names), None, None))
    if q is not None:
        opcheck(OPS.linear_lowrank, (*(given[n] for n in names), q.view(given["h"].shape), scale))


@pytest.mark.slow
@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("without", [(), ("x",), ("weight",), ("s",), ("x", "weight", "lora_a")])
def test_opcheck_passes_for_the_backward(without, lead, device):
    x, weight, _, a, b, scaling, *_ = op_arguments(CASES["q, k, v"])
    operands = {"x": x, "weight": weight, "s": torch.randn(2, 19, 18), "lora_a": a, "lora_b": b}
    operands = {n: None if n in without else t.detach() for n, t in operands.items()}
    leading = (torch.randn(2, 19, 96), operands["x"], operands["weight"], None)
    low_rank = (operands["s"], operands["lora_a"], operands["lora_b"])
    given = *leading, *low_rank, scaling, 3, lead, 0.3, torch.tensor(SEED), True
    on(device, torch.library.opcheck)(OPS.linear_backward, given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q, k, v", "q twice as wide", "dropout", "w8a8"])
def test_compiles_as_one_graph_forward_and_backward(name, device):
    given = operands(CASES[name], torch.float32)
    eager = with_gradients(on(device, lora_linear), given)
    compiled = with_gradients(on(device, torch.compile(lora_linear, fullgraph=True, backend="aot_eager")), given)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=0, atol=0)


def test_exports_with_op_nodes_and_a_dynamic_batch(device):
    given = operands(Case(lead=(4, 5), k=72, n=96, groups=3), torch.float32)
    x, longer = moved((given["x"].detach(), torch.randn(7, 5, 72)), device)
    other = {n: detached(moved(t, device)) for n, t in given.items() if n != "x"}

    class Module(torch.nn.Module):
        def forward(self, x):
            return lora_linear(x, **other)

    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=1024)},))
    assert any(node.target is OPS.lora_linear.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(longer), lora_linear(longer, **other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [lora_linear, linear_lowrank])
def test_autocast_decides_the_compute_dtype_and_casts_no_parameter(function, dtype, device):
    draw = operands if function is lora_linear else lowrank_operands
    given = moved(draw(CASES["q, k, v"], torch.float32), device)
    with torch.autocast(device.type, dtype):
        y = function(**given)
        names = saved(function, given)
    assert y.dtype == dtype
    low = given | {n: given[n].to(dtype) for n in ("x", "h", "s") if n in given}
    assert torch.equal(y, function(**low))
    assert {"weight", "lora_b"} <= names


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast_around_backward_alone_changes_nothing(dropout, device):
    given = moved(operands(Case(dropout=dropout), torch.float32), device)
    leaves = [t for t in given.values() if torch.is_tensor(t) and t.requires_grad]
    expected = torch.autograd.grad(lora_linear(**given).sum(), leaves)
    y = lora_linear(**given)
    with torch.autocast(device.type, torch.bfloat16):
        got = torch.autograd.grad(y.sum(), leaves)
    assert len(leaves) >= 3 and all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


# --------------------------------------------------------------------------------------------------------------- errors
WRONG = {
    "x of integers": ({"x": torch.ones(3, 40, dtype=torch.int64)}, TypeError, "must be floating"),
    "columns": ({"x": torch.ones(3, 41)}, ValueError, r"weight must be \[N, K\] .* not \(24, 40\) for \(3, 41\)"),
    "weight of one dimension": ({"weight": torch.ones(40)}, ValueError, r"weight must be \[N, K\] .* not \(40,\)"),
    "x without dimensions": ({"x": torch.tensor(1.0)}, ValueError, r"weight must be \[N, K\] .* for \(\)"),
    "packed weight": ({"weight": torch.ones(24, 40, dtype=torch.uint8)}, TypeError, "weight must be floating"),
    "bias of integers": ({"bias": torch.ones(24, dtype=torch.int64)}, TypeError, "bias must be floating"),
    "A of integers": ({"lora_a": torch.ones(6, 40, dtype=torch.int64)}, TypeError, "lora_a must be floating"),
    "B of integers": ({"lora_b": torch.ones(24, 6, dtype=torch.int64)}, TypeError, "lora_b must be floating"),
    "bias": ({"bias": torch.ones(25)}, ValueError, r"bias must be \[24\]"),
    "groups": ({"groups": 5}, ValueError, "groups must divide the weight's 24 rows, .* and 5 does not"),
    "a lead": ({"groups": 3, "lead": 3}, ValueError, "weight's 24 rows, .* 3 with a lead of 3 do not"),
    "no lead": ({"lead": 0}, ValueError, "with a lead of 0 do not"),
    "rows of A": ({"lora_a": torch.ones(7, 40)}, ValueError, r"lora_a must be \[6, 40\]"),
    "rows of B": ({"lora_b": torch.ones(23, 6)}, ValueError, r"lora_b must be \[24, r\]"),
    "rank 0": ({"lora_a": torch.ones(0, 40), "lora_b": torch.ones(24, 0)}, ValueError, "r at least 1"),
    "A without B": ({"lora_b": None}, ValueError, "go together"),
    "scale of a float weight": ({"weight_scale": torch.ones(24)}, ValueError, "weight_scale goes with an int8 weight"),
    "int8 without a scale": ({"weight": torch.ones(24, 40, dtype=torch.int8)}, ValueError, "weight_scale missing"),
    "quantised input": ({"quantize_input": True}, ValueError, "need an int8 weight"),
    "dropout": ({"dropout": 1.0}, ValueError, "below 1, not 1.0"),
    "devices": ({"bias": torch.ones(24, device="meta")}, ValueError, "on one device, not on cpu and meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_computed_is_refused_in_one_sentence(name):
    wrong, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        lora_linear(**operands(Case(), torch.float32) | wrong)


def test_linear_lowrank_refuses_an_s_of_other_rows():
    given = lowrank_operands(Case(lead=(4,)), torch.float32)
    with pytest.raises(ValueError, match=r"s must be \[4, 6\]"):
        linear_lowrank(**given | {"s": torch.ones(5, 6)})


# ------------------------------------------------------------------------------------------------------------- launches
@pytest.mark.slow
def test_triton_makes_g_and_db_in_one_pass_and_launches_nothing_that_is_not_needed(device):
    def launches(function, given, backward=True):
        with running("triton", device, ()) as launched:
            y = on(device, function)(**given)
            forward = len(launched)
            if backward:
                y.sum().backward()
        return launched[:forward], launched[forward:]

    low_rank = ["lora_linear_backward_low_rank", "sum_parts"]
    full, lowrank = operands(Case(), torch.float32), lowrank_operands(Case(), torch.float32)
    frozen = operands(Case(r=None), torch.float32)
    assert launches(lora_linear, full) == (
        ["lora_linear_project", "linear_lowrank_forward"],
        [*low_rank, "reduce_rows", "sum_parts"],  # dX is the library's GEMM
    )
    assert launches(linear_lowrank, lowrank) == (["linear_lowrank_forward"], low_rank)  # dH is the library's GEMM
    assert launches(lora_linear, frozen) == ([], [])  # the library's GEMM
    bottom = full | {"x": full["x"].detach()}
    assert launches(lora_linear, bottom)[1] == [*low_rank, "reduce_rows", "sum_parts"]
    w8a8 = operands(CASES["w8a8"], torch.float32)
    assert launches(lora_linear, w8a8, False)[0][1:] == ["quantize_rows_kernel", "linear_lowrank_forward"]


def test_a_quantised_weight_from_quantize_rows_fits_lora_linear(device):
    w, x = torch.randn(24, 40), torch.randn(5, 40)
    q, scale = on(device, quantize_rows)(w)
    y = on(device, lora_linear)(x, q, None, None, None, 1.0, scale)
    assert ((y - x @ w.t()).abs() <= x.abs().sum(1, keepdim=True) * scale / 2 * (1 + 1e-4)).all()
