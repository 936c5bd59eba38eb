"""LayerNorm and linear as one: what the two ops say one after the other, on both implementations."""

import pytest
import torch
from running import CPU, moved, on, running
from tolerance import assert_as_exact_as

from u2a_fast.kernels import assemble_norm_project, linear_lowrank, norm_linear, quantize_rows
from u2a_fast.kernels.norm_linear import norm_linear_backward, norm_linear_forward

# width, outputs, groups, lead, rank (None: no adapter), norm ("rms": RMSNorm), bias, int8 weight
CASES = {
    "q, k, v": (40, 96, 3, 1, 5, True, True, False),
    "q twice as wide": (40, 96, 3, 2, 5, True, True, False),
    "no norm": (40, 24, 1, 1, 5, False, True, False),
    "no adapter": (40, 24, 1, 1, None, True, True, False),
    "no bias": (24, 48, 2, 1, 1, True, False, False),
    "int8": (40, 95, 3, 3, 5, True, True, True),
    "RMSNorm": (40, 96, 3, 1, 5, "rms", True, False),
}


def operands(case, dtype, seed=0):
    width, outputs, groups, lead, rank, norm, bias, int8 = CASES[case]
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0, std=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std + mean

    wide = torch.promote_types(dtype, torch.float32)
    weight, scale = draw(outputs, width, std=width**-0.5), None
    weight, scale = quantize_rows(weight) if int8 else (weight.to(dtype), None)
    return {
        "x": draw(2, 19, width, mean=0.5).to(dtype).requires_grad_(),
        "norm_weight": draw(width, mean=1.0, std=0.3).to(wide).requires_grad_() if norm else None,
        "norm_bias": draw(width).to(wide).requires_grad_() if norm is True else None,
        "eps": 1e-5,
        "weight": weight,
        "bias": draw(outputs).to(wide).requires_grad_() if bias else None,
        "lora_a": None if rank is None else draw(groups * rank, width, std=0.2).to(wide).requires_grad_(),
        "lora_b": None if rank is None else draw(outputs, rank).to(wide).requires_grad_(),
        "scaling": 0.7,
        "weight_scale": scale,
        "groups": groups,
        "lead": lead,
        "rms": norm == "rms",
    }


def one_after_the_other(x, weight, bias, lora_a, lora_b, scaling, weight_scale, groups, lead, **norm):
    h, s, rows = assemble_norm_project(tokens=x, lora_a=lora_a, **norm)
    return linear_lowrank(h, weight, bias, s, lora_b, scaling, weight_scale, groups, lead), rows


def results(f, given):
    y, rows = f(**given)
    g = torch.Generator().manual_seed(1)
    d_y, d_rows = ((torch.randn(t.shape, generator=g, dtype=torch.float64) + 0.3).to(t.dtype) for t in (y, rows))
    leaves = {n: t for n, t in given.items() if torch.is_tensor(t) and t.requires_grad}
    grads = torch.autograd.grad((y, rows), list(leaves.values()), (d_y, d_rows))
    return {"y": y.detach()} | {f"d {n}": grad for n, grad in zip(leaves, grads, strict=True)}


def in_dtype(given, dtype):
    return {
        n: t.detach().to(dtype).requires_grad_(t.requires_grad) if torch.is_tensor(t) and t.is_floating_point() else t
        for n, t in given.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_it_is_as_exact_as_plain_low_precision(implementation, case, dtype, device):
    given = operands(case, dtype)
    with running("reference", device):
        plain = results(on(device, one_after_the_other), in_dtype(given, dtype))
    with running("reference", CPU):
        exact = results(one_after_the_other, in_dtype(given, torch.float64))
    with running(implementation, device, ("bounds", "order")) as launched:
        got = results(on(device, norm_linear), given)
    assert ("assemble_norm_project_forward" in launched) == (implementation == "triton")
    for name in exact:
        assert_as_exact_as(got[name], plain[name], exact[name], 2 if name == "y" else 3, name, device)


@pytest.mark.parametrize("case", ["q, k, v", "q twice as wide", "no norm", "no adapter", "no bias", "RMSNorm"])
def test_gradcheck(case, device):
    given = operands(case, torch.float64)
    names = [n for n, t in given.items() if torch.is_tensor(t) and t.requires_grad]

    def f(*leaves):
        return on(device, norm_linear)(**given | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(f, [given[n] for n in names], fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, device):
    given = moved(operands(case, torch.float32), device)
    given = {n: t.detach() if torch.is_tensor(t) else t for n, t in given.items()}
    x, norm = given["x"].flatten(0, 1), (given["norm_weight"], given["norm_bias"])
    low = given["lora_a"], given["lora_b"], given["weight_scale"]
    eps, options = given["eps"], (0.7, given["groups"], given["lead"])
    operands_ = (x, *norm, given["weight"], given["bias"], *low, eps, given["rms"], *options, False, torch.float32)
    torch.library.opcheck(norm_linear_forward.registered, operands_)
    y, s, mean, rstd = norm_linear_forward(*operands_)
    needs = [True, norm[0] is not None, norm[1] is not None, s is not None, s is not None]
    operands_ = (torch.randn_like(y), x.clone(), x, mean, rstd, *norm, given["weight"], *low, s, eps, *options)
    torch.library.opcheck(norm_linear_backward.registered, (*operands_, torch.float32, needs))


def test_a_weight_that_trains_gets_its_gradient(device):
    given = operands("q, k, v", torch.float64)
    given["weight"].requires_grad_()
    got, exact = results(on(device, norm_linear), given), results(one_after_the_other, given)
    torch.testing.assert_close(got["d weight"], exact["d weight"])


def test_the_residual_shares_the_memory_of_x(device):
    given = moved(operands("q, k, v", torch.float32), device)
    assert norm_linear(**given)[1].data_ptr() == given["x"].data_ptr()


def test_without_a_norm_or_an_adapter_no_pass_is_launched(device):
    with running("triton", device) as launched:
        y, _ = on(device, norm_linear)(torch.randn(2, 3, 8), None, None, 1e-5, torch.randn(4, 8), None, None, None, 1.0)
    assert y.shape == (2, 3, 4) and launched == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_a": None}, "lora_a and lora_b go together"),
        ({"lora_b": None}, "lora_a and lora_b go together"),
        ({"lora_a": torch.ones(3, 8)}, r"lora_a must be \[2, 8\]"),
        ({"lora_a": torch.ones(2, 7)}, r"lora_a must be \[2, 8\]"),
        ({"x": torch.ones(3, 8)}, r"x must be \[B, T, D\], not \[3, 8\]"),
        ({"x": torch.ones(3, 8), "norm_weight": None, "norm_bias": None}, r"x must be \[B, T, D\], not \[3, 8\]"),
        ({"norm_weight": torch.ones(9)}, r"norm_weight must be floating point \[8\]"),
        ({"norm_bias": torch.ones(7)}, r"norm_bias must be floating point \[8\]"),
        ({"norm_bias": torch.ones(8).int()}, "not torch.int32"),
        ({"norm_weight": None}, "norm_bias was given without norm_weight"),
        ({"norm_bias": torch.ones(8, device="meta")}, "on one device"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    norm = {"norm_weight": torch.ones(8), "norm_bias": torch.ones(8), "eps": 1e-5}
    low = {"lora_a": torch.ones(2, 8), "lora_b": torch.ones(6, 2), "scaling": 1.0}
    given = {"x": torch.ones(2, 3, 8), "weight": torch.ones(6, 8), "bias": None, **norm, **low}
    with pytest.raises(ValueError, match=message):
        norm_linear(**given | change)
