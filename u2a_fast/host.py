"""The one place where a step reads values of a device on the host.

Who is present, where padding ends and whether labels are in range decide which kernels run, so they are needed on the
CPU. They come over in one copy, the only thing in a step that waits for the device; what is worked out from them goes
back without waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def readable(tensor: Tensor) -> bool:
    """Whether a check may look at its values: not under torch.compile, which would trace the check."""
    return on_host(tensor) and not torch.compiler.is_compiling()


def to_host(*values: Any) -> list[Any]:
    """The values with every tensor on the CPU: those of a device in one copy, all others as they are."""
    away = [value for value in values if torch.is_tensor(value) and not on_host(value)]
    copies = iter(in_one_copy(away) if away else ())
    return [next(copies) if torch.is_tensor(value) and not on_host(value) else value for value in values]


def in_one_copy(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors of any dtypes on one device."""
    joined = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = joined.split([tensor.nbytes for tensor in tensors])
    # A copy each, since the bytes of a wide dtype must start at a multiple of its size.
    return [part.clone().view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def tensors(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays in dictionaries as tensors that share their memory."""
    return {name: tensors(a) if isinstance(a, Mapping) else torch.from_numpy(a) for name, a in arrays.items()}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for it."""
    return tensor.to(device, non_blocking=True)
