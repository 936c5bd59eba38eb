"""Labels of mean 0 and deviation 1, with which a regression trains: their scale, and how a head takes it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def into_head(head: nn.Module, mean: Tensor, deviation: Tensor) -> None:
    """Let a head that was trained on standard labels answer in their own units, mean and deviation `[C]`."""
    for linear in head.modules():  # several where logits are averaged
        if isinstance(linear, nn.Linear):
            _update(linear.weight, lambda weight: weight * deviation[:, None].to(weight))
            _update(linear.bias, lambda bias: bias * deviation.to(bias) + mean.to(bias))


def scale_from(said: Any, count: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation `[C]` as a config says them; ValueError where it says something else."""
    try:
        mean, deviation = (torch.tensor(said[name], dtype=torch.float32) for name in ("mean", "deviation"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the config's label_scale is no mean and deviation: {said!r}") from error
    if mean.shape != (count,) or deviation.shape != (count,) or not (mean + deviation).isfinite().all():
        raise ValueError(f"the config's label_scale is no mean and deviation of {count} labels: {said!r}")
    return mean, deviation


def _update(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """In place, from its whole value, where processes may share it."""
    if not hasattr(parameter, "full_tensor"):
        parameter.copy_(change(parameter))
        return
    from torch.distributed.tensor import distribute_tensor

    whole = change(parameter.full_tensor())
    parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
