"""The rule of the kernel tests: no constants, but what plain PyTorch loses in that precision, on that device."""

import torch


def assert_as_exact_as(got, plain, exact, factor, what=""):
    """`got` is no further from `exact` (fp64) than `factor` times what `plain`, low precision throughout, is."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, plain_error = ((t.double() - exact).abs().max().item() for t in (got, plain))
    allowed = factor * plain_error + torch.finfo(torch.float64).eps * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, over {factor} times the {plain_error:.3g} of plain PyTorch"
