"""The rule of the kernel tests: no constants, but what plain PyTorch loses in that precision, on that device."""

import torch
from running import CPU

IN_TURN = 16 * torch.finfo(torch.float32).eps  # of the largest value: an fp32 sum whose terms come one by one


def assert_as_exact_as(got, plain, exact, factor, what="", device=CPU):
    """`got` is no further from `exact` (fp64) than `factor` times what `plain`, low precision throughout, is.

    A GPU has no tensor cores for fp32: a kernel adds up in turn where its library adds up in a tree, which loses less.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, plain_error = ((t.double() - exact).abs().max().item() for t in (got, plain))
    floor = IN_TURN if device.type == "cuda" and got.dtype == torch.float32 else torch.finfo(torch.float64).eps
    allowed = factor * plain_error + floor * exact.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, over {factor} times the {plain_error:.3g} of plain PyTorch"
