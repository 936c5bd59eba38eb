"""Attention over rows laid end to end: what `attention` says sample by sample, and the low-rank product of that."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from running import CPU, on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import Ends, Group, attention, attention_rows
from u2a_fast.kernels.attention_varlen import ends_of
from u2a_fast.memory import saved_bytes

module = importlib.import_module("u2a_fast.kernels.attention_rows")  # the package's name is the function
HEADS, WIDTH, RANK = 4, 24, 3  # varlen functions of GPUs take multiples of 8

# groups, and options; with "apart" q has rows of its own
CASES = {
    "one group": ([Group(3, 9, 9)], {}),
    "lengths, suffix": ([Group(3, 9, 9)], {"lengths": (7, 0, 3), "suffix": 2}),
    "lengths, causal": ([Group(3, 9, 9)], {"lengths": (9, 1, 4), "causal": True}),
    "several lengths": ([Group(2, 3, 3), Group(1, 8, 8), Group(3, 1, 1)], {}),
    "several lengths, causal": ([Group(2, 3, 3), Group(1, 8, 8)], {"causal": True}),
    "few queries, apart": ([Group(2, 1, 5), Group(1, 1, 8)], {}),
    "few queries, lengths, apart": ([Group(3, 2, 9)], {"lengths": (7, 0, 3), "suffix": 2}),
    "nobody": ([Group(0, 9, 9)], {}),
    "keys that nobody asks, apart": ([Group(2, 0, 4), Group(2, 1, 5), Group(0, 3, 3), Group(1, 0, 2)], {}),
    "shared keys": ([Group(2, 3, 3), Group(1, 8, 8), Group(3, 1, 1)], {"kv_heads": 2}),
    "shared keys, causal": ([Group(2, 7, 7)], {"kv_heads": 1, "causal": True}),
    "shared keys, lengths, suffix": ([Group(3, 9, 9)], {"kv_heads": 2, "lengths": (7, 0, 3), "suffix": 2}),
    "shared keys, lengths, causal": ([Group(3, 9, 9)], {"kv_heads": 2, "lengths": (9, 1, 4), "causal": True}),
    "shared keys, few queries, apart": ([Group(2, 1, 5), Group(1, 3, 8)], {"kv_heads": 1}),
    "shared keys, nobody": ([Group(0, 9, 9)], {"kv_heads": 2}),
    "few queries, causal, apart": ([Group(2, 1, 5), Group(1, 3, 8)], {"causal": True, "kv_heads": 2}),
    "few queries, causal, lengths, apart": ([Group(3, 3, 9)], {"causal": True, "lengths": (7, 0, 3), "suffix": 2}),
    "window": ([Group(2, 3, 3), Group(2, 12, 12), Group(3, 1, 1)], {"window": 2}),
    "window, causal": ([Group(2, 3, 3), Group(2, 12, 12)], {"window": 2, "causal": True, "kv_heads": 2}),
    "window, apart": ([Group(2, 9, 9)], {"window": 0}),
    "window, suffix": ([Group(2, 3, 3), Group(2, 11, 11)], {"window": 3, "suffix": 2, "kv_heads": 1}),
    "window, lengths, causal": ([Group(3, 9, 9)], {"window": 1, "lengths": (7, 0, 3), "suffix": 2, "causal": True}),
    "window, positions": ([Group(2, 3, 3), Group(2, 11, 11)], {"window": 3, "suffix": 1, "kv_heads": 2}),
    "window, positions, lengths": ([Group(3, 9, 9)], {"window": 3, "lengths": (9, 0, 4)}),
    "window, nobody": ([Group(0, 9, 9)], {"window": 2}),
}


def operands(case, dtype):
    """q, kv or None, A, and a weight for either result; non-zero mean."""
    g, (groups, given) = torch.Generator().manual_seed(0), CASES[case]
    queries, keys = (sum(group.samples * rows(group) for group in groups) for rows in (lambda g: g[1], lambda g: g[2]))
    width, of_kv = HEADS * WIDTH, 2 * given.get("kv_heads", HEADS) * WIDTH
    shapes = [(queries, width if "apart" in case else width + of_kv), (keys, of_kv), (RANK, width)]
    q, kv, a, d_out, d_s = (
        (torch.randn(s, generator=g, dtype=torch.float64) + 0.3).to(dtype)
        for s in (*shapes, (queries, width), (queries, RANK))
    )
    leaves = [q.requires_grad_(), kv.requires_grad_() if "apart" in case else None, a.requires_grad_()]
    return *leaves, d_out, d_s


def options(case):
    given = dict(CASES[case][1])
    if "lengths" in given:
        given["lengths"] = torch.tensor(given["lengths"])
    if "positions" in case:  # with holes
        rows = sum(group.samples * group.keys for group in CASES[case][0])
        given["positions"] = torch.randint(1, 4, (rows,), generator=torch.Generator().manual_seed(2)).cumsum(0)
    return given


def shown(case, rows, dtype):
    """[Nq, 1]: 0 at rows of padding, which are undefined."""
    groups, given = CASES[case]
    if "lengths" not in given or "apart" in case:
        return torch.ones(rows, 1, dtype=dtype)
    position, suffix = torch.arange(groups[0].keys), given.get("suffix", 0)
    kept = [(position < length) | (position >= groups[0].keys - suffix) for length in given["lengths"]]
    return torch.cat(kept)[:, None].to(dtype)


def results(f, q, kv, a, d_out, d_s, case):
    out, s = f(q, kv, HEADS, CASES[case][0], a, **options(case))
    mask = shown(case, q.shape[0], out.dtype)
    leaves = [t for t in (q, kv, a) if t is not None]
    grads = torch.autograd.grad((out * d_out * mask).sum() + (s * d_s * mask).sum(), leaves)
    return [(out * mask).detach(), (s * mask).detach(), *grads]


def apart(q, kv, kv_heads):
    """q, k and v by themselves."""
    return (q, *kv.chunk(2, 1)) if kv is not None else q.split((HEADS * WIDTH, kv_heads * WIDTH, kv_heads * WIDTH), 1)


def sample_by_sample(q, kv, heads, groups, a, lengths=None, kv_heads=None, positions=None, **options):
    """`attention` on every sample of every group alone."""
    q, k, v = apart(q, kv, kv_heads or heads)
    each, q_at, k_at, number = [q[:0]], 0, 0, 0
    for samples, queries, keys in groups:
        for _ in range(samples):
            rows = (q[q_at : q_at + queries], k[k_at : k_at + keys], v[k_at : k_at + keys])
            views = (t.unflatten(1, (-1, WIDTH)).transpose(0, 1)[None] for t in rows)
            own = {} if lengths is None else {"lengths": lengths[number : number + 1]}
            own |= {} if positions is None else {"positions": positions[None, k_at : k_at + keys]}
            each.append(attention(*views, **own, **options)[0].transpose(0, 1).flatten(1))
            q_at, k_at, number = q_at + queries, k_at + keys, number + 1
    out = torch.cat(each) + 0 * (k.sum() + v.sum())
    return out, out @ a.t()


def fp64(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_results_and_gradients_are_those_of_attention_sample_by_sample(implementation, dtype, case, device):
    tensors = operands(case, dtype)
    with running("reference", CPU):
        exact = results(sample_by_sample, *fp64(tensors), case)
    with running(implementation, device):
        plain = results(on(device, sample_by_sample), *tensors, case)
        rows = results(on(device, attention_rows), *tensors, case)
    for i, (got, low, high) in enumerate(zip(rows, plain, exact, strict=True)):
        assert_as_exact_as(got, low, high, 2 if i < 2 else 3, str(i))


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, device):
    q, kv, a, *_ = operands(case, torch.float64)
    mask = shown(case, q.shape[0], torch.float64)

    def f(*leaves):
        given = dict(zip([n for n, t in (("q", q), ("kv", kv)) if t is not None], leaves[:-1], strict=True))
        operands = given["q"], given.get("kv"), HEADS, CASES[case][0], leaves[-1]
        out, s = on(device, attention_rows)(*operands, **options(case))
        return out * mask, s * mask

    assert torch.autograd.gradcheck(f, [t for t in (q, kv, a) if t is not None], fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        "one group",
        "lengths, suffix",
        "several lengths",
        "few queries, apart",
        "shared keys, lengths, causal",
        "window, positions",
    ],
)
def test_opcheck(case, dtype):
    """Of ops for a CPU: on a GPU attention_rows calls others."""
    q, kv, a, d_out, d_s = (None if t is None else t.detach() for t in operands(case, dtype))
    given = dict(lengths=None, suffix=0, causal=False, kv_heads=HEADS, window=None, positions=None) | options(case)
    flat = [size for group in CASES[case][0] for size in group]
    torch.library.opcheck(module.attention_rows_forward.registered, (q, kv, a, HEADS, flat, *given.values()))
    out, _, lse = module.attention_rows_forward(q, kv, a, HEADS, flat, *given.values())
    kept = (None, None) if lse is None else (out, lse)
    operands_ = (d_out, d_s, q, kv, a, *kept, HEADS, flat, *given.values())
    torch.library.opcheck(module.attention_rows_backward.registered, operands_)


def test_in_bf16_only_the_inputs_are_kept():
    q, kv, a, *_ = operands("several lengths", torch.bfloat16)

    def f():
        return attention_rows(q, kv, HEADS, CASES["several lengths"][0], a)

    assert saved_bytes(f) == (q.numel() + a.numel()) * 2


def test_autocast_computes_in_its_dtype(device):
    q, kv, a, *_ = operands("one group", torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        out, s = on(device, attention_rows)(q, kv, HEADS, CASES["one group"][0], a)
    assert out.dtype == s.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "groups, lengths, message",
    [
        ([Group(2, 3, 3)], None, "do not add up to 27 rows of q"),
        ([Group(1, 9, 9), Group(2, 9, 9)], torch.tensor([1, 2, 3]), "lengths hide keys of a single group, not of 2"),
        ([Group(-3, -9, -9)], None, "counts of samples and of their rows"),
        ([Group(3, 9, 9)], torch.tensor([1, 2]), r"lengths must be \[3\] integers"),
        ([Group(3, 9, 9)], torch.ones(3), "not torch.float32"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, lengths, message):
    q, *_ = operands("one group", torch.float32)
    with pytest.raises(ValueError, match=message):
        attention_rows(q, None, HEADS, groups, lengths=lengths)


@pytest.mark.parametrize(
    "groups, also, message",
    [
        ([Group(3, 10, 9)], {"causal": True}, "no more than keys"),
        ([Group(3, 1, 9)], {"window": 2}, "q of the same rows as k and v"),
        ([Group(3, 9, 9)], {"window": -2}, "0 or more, not -2"),
        ([Group(3, 9, 9)], {"window": 2, "positions": torch.arange(9)}, r"int64 \[27\], not torch.int64 \[9\]"),
    ],
)
def test_what_causality_and_windows_cannot_mean_is_refused(groups, also, message):
    samples, queries, keys = groups[0]
    q, kv = torch.ones(samples * queries, HEADS * WIDTH), torch.ones(samples * keys, 2 * HEADS * WIDTH)
    with pytest.raises(ValueError, match=message):
        attention_rows(q, kv, HEADS, groups, **also)


@pytest.mark.parametrize("groups", [[Group(2, 3, 0)], [Group(1, 2, 0), Group(2, 1, 4)]])
def test_queries_without_keys_are_refused(groups):
    queries, keys = (sum(group.samples * group[i] for group in groups) for i in (1, 2))
    q, kv = torch.ones(queries, HEADS * WIDTH), torch.ones(keys, 2 * HEADS * WIDTH)
    with pytest.raises(ValueError, match="queries need keys"):
        attention_rows(q, kv, HEADS, groups)


@pytest.mark.parametrize(
    "kv_heads, message",
    [(3, "kv_heads must divide the 4 heads of q, not be 3"), (0, "not be 0"), (1, r"q must be \[N, 6 \* Dh\]")],
)
def test_heads_that_do_not_fit_are_refused(kv_heads, message):
    q = torch.ones(3, 3 * HEADS * 5)
    with pytest.raises(ValueError, match=message):
        attention_rows(q[:, :-1] if kv_heads == 1 else q, None, HEADS, [Group(1, 3, 3)], kv_heads=kv_heads)


@pytest.mark.parametrize(
    "q, also, error, message",
    [
        (torch.ones(9, 36).int(), {}, TypeError, "one floating point dtype, not torch.int32"),
        (torch.ones(9, 12), {"kv": torch.ones(9, 24).double()}, TypeError, "torch.float32 and torch.float64"),
        (torch.ones(9, 0), {}, ValueError, r"q must be \[N, 12 \* Dh\]"),
        (torch.ones(9, 36), {"lora_a": torch.ones(2, 36)}, ValueError, r"lora_a must be \[R, 12\]"),
        (torch.ones(9, 36), {"lora_a": torch.ones(0, 12)}, ValueError, "R at least 1"),
        (torch.ones(9, 36), {"suffix": -1}, ValueError, "rows of every sample, not be -1"),
        (torch.ones(9, 36), {"suffix": 4}, ValueError, "rows of every sample, not be 4"),
    ],
)
def test_operands_that_do_not_fit_are_refused(q, also, error, message):
    with pytest.raises(error, match=message):
        attention_rows(q, **{"kv": None, "heads": HEADS, "groups": [(3, 3, 3)]} | also)


def test_plain_triples_are_groups():
    q = torch.randn(9, 36)
    assert torch.equal(
        attention_rows(q, None, HEADS, [(3, 3, 3)])[0], attention_rows(q, None, HEADS, [Group(3, 3, 3)])[0]
    )


@pytest.mark.parametrize("also", [{"lengths": torch.tensor([4, 5])}, {"causal": True}, {"window": 5}])
def test_ends_leave_nothing_else_to_say_of_samples(also):
    q, *_ = operands("one group", torch.float32)
    ends = torch.tensor([0, len(q)], dtype=torch.int32)
    ends = Ends(ends, ends, len(q), len(q))
    with pytest.raises(ValueError, match="leave lengths, causal and window out"):
        attention_rows(q, None, HEADS, ends, **also)
    see = {"lengths": None, "suffix": 0, "causal": False, "kv_heads": None, "window": None, "positions": None} | also
    with pytest.raises(ValueError, match="leave lengths, causal and window out"):
        module.attend(q.detach(), HEADS, ends, *see.values(), differentiable=False)
    wide, _ = attention_rows(q, None, HEADS, ends, window=len(q) - 1)  # hides nothing
    assert torch.equal(wide, attention_rows(q, None, HEADS, ends)[0])


BY_ENDS = ["several lengths", "few queries, apart", "shared keys", "shared keys, few queries, apart"]


@pytest.mark.parametrize("case", BY_ENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ends_on_the_device_say_what_groups_say(case, dtype, device):
    q, kv, *_ = operands(case, dtype)
    groups, given = CASES[case]

    def by_ends(q, kv):
        return attention_rows(q, kv, HEADS, ends_of(tuple(groups), q.device), **given)[0]

    expected, _ = on(device, attention_rows)(q, kv, HEADS, groups, **given)
    limit = 1e-9 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(on(device, by_ends)(q, kv), expected, rtol=limit, atol=limit)


# cases of several groups, and whether a varlen function can say what they see
BY_VARLEN = dict.fromkeys([*BY_ENDS, "several lengths, causal", "few queries, causal, apart"], True)
BY_VARLEN |= {"window": True, "window, causal": True, "window, suffix": False, "window, positions": False}


@pytest.mark.parametrize("case", BY_VARLEN)
def test_a_varlen_function_gets_rows_and_ends_of_every_sample(case, monkeypatch):
    """A stand-in for the libraries' functions, which need a GPU: attention of each sample by itself."""
    calls = []

    def varlen(q, k, v, q_ends, k_ends, most_q, most_k, window_size=(-1, -1), enable_gqa=False):
        assert q_ends.dtype == k_ends.dtype == torch.int32 and q_ends.is_contiguous() and k_ends.is_contiguous()
        assert most_q == q_ends.diff().max() and most_k == k_ends.diff().max()
        assert enable_gqa == (k.shape[1] < q.shape[1])
        left, right = window_size
        assert right in (-1, 0, left)
        see = {"causal": right == 0 and left != 0, "window": None if left == -1 else left}
        out = torch.zeros_like(q)
        for (start, end), (first, last) in zip(*map(itertools.pairwise, (q_ends, k_ends)), strict=True):
            one = (q[start:end], k[first:last], v[first:last])
            out[start:end] = attention(*(t.transpose(0, 1)[None] for t in one), **see)[0].transpose(0, 1)
        calls.append(window_size)
        return out

    q, kv, *_ = operands(case, torch.float64)
    groups, given = CASES[case][0], options(case)
    expected, _ = attention_rows(q, kv, HEADS, groups, **given)
    monkeypatch.setattr(module, "fits_varlen", lambda *_: True)
    monkeypatch.setattr(module, "varlen_function", lambda: varlen)
    with running("reference", CPU):
        torch.testing.assert_close(attention_rows(q, kv, HEADS, groups, **given)[0], expected)
    assert len(calls) == BY_VARLEN[case]


def test_a_varlen_function_is_called_only_where_there_is_one(monkeypatch):
    varlen = importlib.import_module("u2a_fast.kernels.attention_varlen")
    monkeypatch.setattr(varlen, "supports_triton", lambda *_: (True, ""))
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    for function in (print, None):
        monkeypatch.setattr(varlen, "varlen_function", lambda found=function: found)
        assert varlen.fits_varlen(q, 64) == (function is not None)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_an_exported_program_takes_any_number_of_samples(implementation):
    class Module(torch.nn.Module):
        def forward(self, qkv):
            samples, rows, _ = qkv.shape
            return attention_rows(qkv.flatten(0, 1), None, HEADS, [Group(samples, rows, rows)])[0]

    drawn = torch.randn(7, 5, 3 * HEADS * WIDTH)
    with running(implementation, CPU):
        sizes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(Module(), (drawn[:3],), dynamic_shapes=sizes).module()
        for samples in (1, 2, 7):
            torch.testing.assert_close(program(drawn[:samples]), Module()(drawn[:samples]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_samples_has_no_groups(dtype, device):
    qkv = torch.zeros(0, 3 * HEADS * WIDTH, dtype=dtype, requires_grad=True)
    out, _ = on(device, attention_rows)(qkv, None, HEADS, [])
    out.sum().backward()
    assert out.shape == (0, HEADS * WIDTH) and qkv.grad.shape == qkv.shape
