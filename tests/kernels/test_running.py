"""What takes a test to a device changes nothing on the way: neither strides nor gradients."""

import pytest
import torch
from running import CPU, moved, on

OTHER = torch.device("cpu", 0)  # the CPU by another name: copied to as a GPU is
VIEWS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.mT,
    "gaps and an offset": lambda t: t[:, 1:, ::2],
    "expanded": lambda t: t[:1, :, :1].expand(3, 4, 5),
    "nothing": lambda t: t[:0],
    "one number": lambda t: t[1, 2, 3],
}


@pytest.mark.parametrize("view", VIEWS)
def test_copies_keep_values_strides_and_offset(view):
    t = VIEWS[view](torch.randn(2, 4, 6))
    copy = moved({"t": [t, None]}, OTHER)["t"][0]
    assert torch.equal(copy, t) and copy.stride() == t.stride()
    assert not t.numel() or (copy.storage_offset() == t.storage_offset() and copy.data_ptr() != t.data_ptr())


@pytest.mark.parametrize("view", VIEWS)
def test_gradients_come_back_as_without_a_device(view):
    leaf = VIEWS[view](torch.randn(2, 4, 6)).detach().requires_grad_()
    weight = torch.randn(leaf.shape)
    results = []
    for device in (CPU, OTHER):
        out = on(device, lambda t: {"out": t.sin() * t})(t=leaf)["out"]
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_lies_there_already_is_not_copied():
    t = torch.ones(2)
    assert moved(t, CPU) is t and on(CPU, torch.sin) is torch.sin
