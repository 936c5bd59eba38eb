"""Planted slips in the kernels that multiply no weight, and the probes to notice them."""

import functools

import torch
from assemble_cases import clone, operands, outputs_and_gradients
from mutants import Mutant
from triton_interpreter import SANITIZERS, interpreted

import u2a_fast.kernels


def same_as_reference(kernels, run):
    """`run(kernels)`, {name: tensor}, under the sanitizers against the unchanged reference backend, both in fp32."""
    u2a_fast.kernels.set_backend("reference")
    try:
        expected = run(u2a_fast.kernels)
    finally:
        u2a_fast.kernels.set_backend("auto")
    with interpreted(SANITIZERS, backend=kernels.backend):
        got = run(kernels)
    for name, exact in expected.items():
        torch.testing.assert_close(got[name], exact, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def with_gradients(outputs, leaves):
    loss = sum((t * torch.arange(1.0, t.numel() + 1).sin().view(t.shape)).sum() for t in outputs)
    grads = torch.autograd.grad(loss, leaves)
    return {f"output {i}": t.detach() for i, t in enumerate(outputs)} | {f"grad {i}": g for i, g in enumerate(grads)}


def assembled(case):
    """A probe: assemble_norm_project's results and gradients; absent samples hold NaN."""
    return functools.partial(_assembled, case)


def _assembled(case, kernels):
    given = operands(case, torch.float32)
    same_as_reference(kernels, lambda k: outputs_and_gradients(clone(given), k.assemble_norm_project))


def quantized(kernels):
    """A probe: the int8 rows that assemble_norm_project writes, in two pieces of columns."""
    given = operands("no rank", torch.float32)

    def run(k):
        (_, q, scale), _, _ = k.assemble_norm_project(**given, quantize=True)
        return {"q": q.float(), "scale": scale.detach()}

    same_as_reference(kernels, run)


def substituted(kernels):
    """A probe: substitute's results and gradients; three modalities, absent rows full of NaN."""
    g = torch.Generator().manual_seed(0)
    present = torch.rand(21, 3, generator=g) < 0.6
    present[0], present[1] = False, True
    c = (torch.randn(3, 21, 150, generator=g) + 1).masked_fill(~present.t()[:, :, None], float("nan"))
    p = (torch.randn(3, 3, 21, 150, generator=g) + 1).masked_fill(~present.t()[:, None, :, None], float("nan"))
    leaves = c.requires_grad_(), p.requires_grad_()
    same_as_reference(kernels, lambda k: with_gradients(k.substitute(*leaves, present, False), leaves))


def attended(kernels):
    """A probe: few queries against more keys than a block, with lengths, suffix rows and a sample without tokens."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 5, 20, generator=g).requires_grad_()
    k, v = (torch.randn(3, 2, 70, 20, generator=g).add_(0.3).requires_grad_() for _ in range(2))
    lengths = torch.tensor([66, 0, 9])
    same_as_reference(kernels, lambda which: with_gradients([which.attention(q, k, v, lengths, suffix=3)], (q, k, v)))


def laid_end_to_end(kernels):
    """A probe: samples of several lengths, with a window, and with few queries that see the keys before them."""
    g = torch.Generator().manual_seed(0)
    qkv, q, kv = (
        torch.randn(*shape, generator=g).add_(0.3).requires_grad_() for shape in ((75, 64), (5, 32), (75, 32))
    )
    rows = {"heads": 4, "kv_heads": 2}

    def run(k):
        own = k.attention_rows(qkv, None, groups=[(1, 5, 5), (1, 70, 70)], window=3, **rows)[0]
        others = k.attention_rows(q, kv, groups=[(1, 2, 5), (1, 3, 70)], causal=True, **rows)[0]
        return with_gradients([own, others], (qkv, q, kv))

    same_as_reference(kernels, run)


def rotated(kernels):
    """A probe: five heads of 70 columns, in rows that hold more, normalised and rotated."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(21, 400, generator=g).add_(0.3).requires_grad_()
    angles = torch.randn(21, 35, generator=g)
    frozen = angles.cos(), angles.sin(), torch.rand(5, 70, generator=g) + 0.5, 0.1
    same_as_reference(kernels, lambda k: with_gradients([k.rotary(rows * 1, 5, *frozen)], [rows]))


def gated(activation):
    """A probe: more rows and columns than a tile."""
    return functools.partial(_gated, activation)


def _gated(activation, kernels):
    h = torch.randn(9, 1100, generator=torch.Generator().manual_seed(0)).add_(0.3).requires_grad_()
    same_as_reference(kernels, lambda k: with_gradients([k.gated(h, activation)], [h]))


def shared(kernels):
    """A probe: few queries, three heads of q to one of k and v."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 20, generator=g).requires_grad_()
    k, v = (torch.randn(2, 2, 9, 20, generator=g).add_(0.3).requires_grad_() for _ in range(2))
    same_as_reference(kernels, lambda which: with_gradients([which.attention(q, k, v, suffix=3)], (q, k, v)))


def in_rows(dtype, **seen):
    """A probe: attention_rows on a CPU, six heads of q to two of k and v, results and gradients."""
    return functools.partial(_in_rows, dtype, seen)


def _in_rows(dtype, seen, kernels):
    groups, g = [u2a_fast.kernels.Group(2, 4, 4), u2a_fast.kernels.Group(2, 11, 11)], torch.Generator().manual_seed(0)
    qkv = torch.randn(30, 10 * 8, generator=g).add_(0.3).to(dtype)
    if seen.get("lengths") is not None:
        groups = [u2a_fast.kernels.Group(3, 10, 10)]

    def run(which, rows):
        rows = rows.clone().requires_grad_()
        return with_gradients([which.attention_rows(rows, None, 6, groups, kv_heads=2, **seen)[0]], [rows])

    u2a_fast.kernels.set_backend("reference")
    try:
        expected = run(u2a_fast.kernels, qkv.double())
    finally:
        u2a_fast.kernels.set_backend("auto")
    limit = 5e-2 if dtype == torch.bfloat16 else 1e-4  # of sums of a few dozen products
    for name, got in run(kernels, qkv).items():
        torch.testing.assert_close(got.double(), expected[name], rtol=limit, atol=limit)


ASSEMBLE, BACKWARD = "assemble_norm_project.py", "assemble_backward.py"
SUBSTITUTE, ATTENTION = "substitute.py", "attention_small_query.py"
SHORT = "attention_short.py"
ROTARY, GATED, ACTIVATIONS = "rotary.py", "gated.py", "activations.py"
MASK, MATMUL, ROWS = "attention_mask.py", "attention_matmul.py", "attention_rows_aten.py"
WINDOW = in_rows(torch.float32, window=2, suffix=1)
AT_PLACES = in_rows(torch.float32, window=3, positions=torch.arange(0, 60, 2))
PADDED = in_rows(torch.bfloat16, window=2, suffix=1, causal=True, lengths=torch.tensor([9, 0, 4]))
JOINED, PACKED = assembled("everything"), assembled("packed")
WIDE, WIDE_RANK = assembled("no rank"), assembled("wide rank")  # more than one piece of columns, of ranks
SLIPS = {
    # which rows
    "prompt test t <= P": (ASSEMBLE, "tl.where(t < P, (PREFIX", "tl.where(t <= P, (PREFIX", JOINED),
    "suffix starts a row late": (ASSEMBLE, "tl.where(t >= P + N, (SUF", "tl.where(t > P + N, (SUF", JOINED),
    "absent tokens are read": (ASSEMBLE, "tl.where(source < 0, MASK.to(tl.int64), address)", "address", JOINED),
    "packed samples are not looked up": (ASSEMBLE, "TOKENS + (source.to", "TOKENS + (b.to", PACKED),
    "packed gradients stored by sample": (BACKWARD, "            slot = source", "            slot = b", PACKED),
    "absent rows pass their gradient on": (BACKWARD, "tl.where(absent[:, None], 0.0, g)", "g", JOINED),
    "the mask token hears present rows": (BACKWARD, "tl.where(absent[:, None], g, 0.0)", "g", JOINED),
    "suffix gradients on the prefix's rows": (BACKWARD, "tl.where(t < P, t, t - N)", "t % 2", JOINED),
    # norm and projection
    "LayerNorm's tail enters the variance": (
        ASSEMBLE,
        "tl.where(kok[None, :], x - piece[:, None], 0.0)",
        "x - piece[:, None]",
        JOINED,
    ),
    "pieces merged without their shift": (ASSEMBLE, " + shift * shift * (k * (n / (k + n)))", "", WIDE),
    "no tail mask on the columns of A": (ASSEMBLE, "(rr < R)[None, :] & kok[:, None]", "(rr < R)[None, :]", JOINED),
    "further ranks are not shifted": (
        ASSEMBLE,
        "rr = r + tl.arange(0, BR)\n        acc",
        "rr = tl.arange(0, BR)\n        acc",
        WIDE_RANK,
    ),
    "mean square of the last piece alone": (
        ASSEMBLE,
        "squares += tl.sum(x * x, 1)",
        "squares = tl.sum(x * x, 1)",
        assembled("RMSNorm"),
    ),
    "LayerNorm's backward without the mean": (BACKWARD, " + level[:, None]", "", JOINED),
    "dH without d_s A": (BACKWARD, "    if D_S is not None:", "    if D_S is None:", JOINED),
    "the residual's gradient forgotten": (BACKWARD, "if D_ROWS is not None", "if D_ROWS is None", JOINED),
    "dA of rows not normalised": (BACKWARD, "normalise(x, mean, rstd, GAMMA, BETA, rc, cok, ACC)", "x", JOINED),
    "int8 steps of the last piece alone": (
        ASSEMBLE,
        "largest = tl.maximum(largest, tl.max(tl.abs(h.to(tl.float32)), 1))",
        "largest = tl.max(tl.abs(h.to(tl.float32)), 1)",
        quantized,
    ),
    "int8 rows not normalised": (ASSEMBLE, "round_half_even(h.to(", "round_half_even(x.to(", quantized),
    # class tokens and proxies
    "absent proxies are read": (SUBSTITUTE, "mask=mask & has_m[:, None], other", "mask=mask, other", substituted),
    "stand-ins summed, not averaged": (SUBSTITUTE, "stand_in / sources[:, None]", "stand_in", substituted),
    "one class token for all": (SUBSTITUTE, "CLASS + j * size + at", "CLASS + at", substituted),
    "the loss counts all samples": (SUBSTITUTE, "(has_m & tl.load(", "(1 | tl.load(", substituted),
    "the loss without its mask": (SUBSTITUTE, "tl.where((has_m & has_j)[:, None], p - c, 0.0)", "p - c", substituted),
    "one part of the loss": (SUBSTITUTE, "LOSS + tl.program_id(0) *", "LOSS + 0 *", substituted),
    "present targets pull at proxies": (SUBSTITUTE, "has_m & (has_j == 0)", "has_m", substituted),
    "targets pushed the wrong way": (SUBSTITUTE, "dc -= pull", "dc += pull", substituted),
    # few queries
    "length ignored": (ATTENTION, "(rn < length) |", "(rn < TOKENS) |", attended),
    "suffix rows are hidden": (ATTENTION, "| ((rn >= TOKENS) & (rn < S))", "& (rn < S)", attended),
    "keys beyond the last": (ATTENTION, "((rn >= TOKENS) & (rn < S))", "(rn >= TOKENS)", attended),
    "running sum not rescaled": (ATTENTION, "total * keep", "total", attended),
    "dS without the row sum": (ATTENTION, "(dp - delta[:, None])", "dp", attended),
    "dS not scaled": (ATTENTION, "delta[:, None]) * scale)", "delta[:, None]))", attended),
    # short samples
    "keys beyond the sample's last": (SHORT, "visible = key < keys", "visible = key >= 0", laid_end_to_end),
    "a window of one key more": (SHORT, "key >= at - LEFT", "key >= at - LEFT - 1", laid_end_to_end),
    "queries are the first rows": (SHORT, "rq + (keys - queries)", "rq", laid_end_to_end),
    "queries are the first rows, backward": (SHORT, "(rq + before)", "rq", laid_end_to_end),
    "every head has the first keys": (SHORT, "head // SHARE, DH,", "0, DH,", laid_end_to_end),
    "a sum of unequal tops": (SHORT, "total * keep", "total", laid_end_to_end),
    "log-sum-exp of the first head": (SHORT, "* H + head, mask=qok", "* H, mask=qok", laid_end_to_end),
    "dS of keys without the row sum": (SHORT, "(dp - delta[None, :])", "dp", laid_end_to_end),
    "dQ of the last keys alone": (SHORT, "tl.dot(ds, k, dq,", "tl.dot(ds, k, dq * 0,", laid_end_to_end),
    "dK of the last queries alone": (SHORT, "tl.dot(ds, q, dk,", "tl.dot(ds, q, dk * 0,", laid_end_to_end),
    # rotary positions and QK-norm
    "turned the wrong way": (
        ROTARY,
        "first * cos - second * sin, second",
        "first * cos + second * sin, second",
        rotated,
    ),
    "turned on instead of back": (ROTARY, "second * cos - first * sin", "second * cos + first * sin", rotated),
    "neighbours instead of halves": (ROTARY, "tl.load(x + HALF,", "tl.load(x + 1,", rotated),
    "one angle for all rows": (ROTARY, "tl.load(SIN + row * HALF +", "tl.load(SIN + 0 * row +", rotated),
    "the first head alone": (ROTARY, "at = head * 2 * HALF", "at = 0 * head * 2 * HALF", rotated),
    "the halves have norms of their own": (ROTARY, "first * first + second * second", "2 * first * first", rotated),
    "eps forgotten": (ROTARY, "/ (2 * HALF) + eps)[", "/ (2 * HALF))[", rotated),
    "kept after the norm": (
        ROTARY,
        "            tl.store(kept + HALF, second,",
        "            tl.store(kept + HALF, first,",
        rotated,
    ),
    "backward of a norm without its level": (ROTARY, "(second - x2 * along)", "second", rotated),
    "padding columns of a head written": (
        ROTARY,
        "tl.store(x + HALF, second.to(X.dtype.element_ty), mask=mask)",
        "tl.store(x + HALF, second.to(X.dtype.element_ty), mask=(rm < N)[:, None])",
        rotated,
    ),
    # gated activation
    "gate and up exchanged": (GATED, "hidden, _ = activate(gate,", "hidden, _ = activate(up,", gated("silu")),
    "every column tile is the first": (
        GATED,
        "rf = tl.program_id(1) * BF + tl.arange",
        "rf = tl.arange",
        gated("silu"),
    ),
    "rows of dH an F apart": (GATED, "row * 2 * F", "row * F", gated("silu")),
    "no tail mask on F": (GATED, "& (rf < F)[None, :]", "& (rf >= 0)[None, :]", gated("silu")),
    "d_gate without its slope": (GATED, "dy * up * slope", "dy * up", gated("relu")),
    "d_up of the bare gate": (GATED, "(dy * hidden)", "(dy * gate)", gated("relu")),
    "GELU's slope without its second term": (
        ACTIVATIONS,
        "share + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)",
        "share",
        gated("gelu"),
    ),
    "SiLU's slope without its second term": (
        ACTIVATIONS,
        "share + steep * share * (1 - share)",
        "share",
        gated("silu"),
    ),
    "quick_gelu's slope is SiLU's": (ACTIVATIONS, "steep = inner ", "steep = u ", gated("quick_gelu")),
    "tanh-GELU's slope without its square": (
        ACTIVATIONS,
        "* (1 + 0.134145 * u * u)",
        "",
        gated("gelu_tanh"),
    ),
    # heads of q that share one of k and v
    "every other head shares a key": (
        ATTENTION,
        "(kv_heads, -1)).flatten",
        "(-1, kv_heads)).transpose(1, 2).flatten",
        shared,
    ),
    "heads left by key": (ATTENTION, "flatten(1, 2))", "transpose(1, 2).flatten(1, 2))", shared),
    "the first head shares the last key": (MATMUL, "pairs.view(len", "pairs.roll(1, 0).view(len", PADDED),
    "k where v is": (ROWS, "    return heads_of_rows.split", "    return heads_of_rows.flip(1).split", WINDOW),
    # windows
    "a window of one row less": (MASK, "None] - window", "None] - window + 1", WINDOW),
    "a window of one row more": (MASK, "None] + window", "None] + window + 1", WINDOW),
    "no row is too short for a window": (MASK, "<= window + 1", "<= window + 3", in_rows(torch.float32, window=9)),
    "learned rows are beyond the window": (MASK, "    hidden[:, :, tokens:] = False\n", "", WINDOW),
    "learned rows look through the window": (
        MASK,
        "    hidden[:, max(0, tokens - (keys - queries)) :] = False\n",
        "",
        WINDOW,
    ),
    "positions are not read": (MASK, "place[None] if positions is None else positions", "place[None]", AT_PLACES),
    "positions of the first sample": (
        MATMUL,
        "// (pairs // len(bias))",
        "% len(bias)",
        in_rows(torch.bfloat16, window=3, positions=torch.arange(30) ** 2),
    ),
    "causality forgotten in the window": (MASK, "hidden | (own < place) if causal else hidden", "hidden", PADDED),
    "padding forgotten in the window": (
        MASK,
        "padding if place is None else padding | place",
        "place",
        in_rows(torch.float32, window=2, lengths=torch.tensor([9, 7, 4])),
    ),
}
MUTANTS = {name: Mutant(*slip) for name, slip in SLIPS.items()}
