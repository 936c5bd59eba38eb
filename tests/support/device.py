"""A device for machines without one: CPU tensors count as its own, and every read of their values is noted."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from u2a_fast import host

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "argwhere")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class StandIn(TorchDispatchMode):
    """What derives from a tensor on it lies on it too, until `host.in_one_copy` copies it to the host.

    waits: names of operations that read values of the device, each of which would wait for it. copies: how often
    `host.in_one_copy` was called.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.waits: list[str] = []
        self.copies, self._storages, self._paused = 0, {}, False
        self._python = _PythonReads(self)
        copy, send = host.in_one_copy, host.send

        def in_one_copy(tensors):
            self.copies, self._paused = self.copies + 1, True
            try:
                return copy(tensors)
            finally:
                self._paused = False

        def sent(tensor, device):
            tensor = send(tensor, device).clone()
            self.put(tensor)
            return tensor

        monkeypatch.setattr(host, "on_host", lambda tensor: not self.holds(tensor))
        monkeypatch.setattr(host, "in_one_copy", in_one_copy)
        monkeypatch.setattr(host, "send", sent)

    def put(self, *tensors):
        """Storages are held, so that no other gets the same address."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def holds(self, tensor):
        return tensor.untyped_storage()._cdata in self._storages

    def note(self, name):
        if not self._paused:
            self.waits.append(name)

    def __enter__(self):
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._python.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = any(self.holds(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t))
        name = func.name().removeprefix("aten::").split(".")[0]
        if here and (name in READS or (name in INDEXED and _masks(args[1]))):
            self.note(name)
        result = func(*args, **kwargs)
        if here and not self._paused:
            self.put(*(t for t in tree_leaves(result) if torch.is_tensor(t)))
        return result


def _masks(indices):
    return any(torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _PythonReads(TorchFunctionMode):
    """Reads that no dispatched operation shows."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu) and self.device.holds(args[0]):
            self.device.note(func.__name__)
        return func(*args, **(kwargs or {}))
