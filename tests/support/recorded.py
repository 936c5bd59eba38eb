"""What `capture.record` does, for machines without a GPU: the operations of a run, repeated on the same tensors.

As a CUDA graph, a replay knows addresses and nothing else: no line of Python runs, and what a run read of the values of
a tensor would be frozen, so that such a read fails here.
"""

from __future__ import annotations

import torch
from device import READS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in READS, f"{name} reads values, which a replay would not read again"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


def record(run, pool):
    recorded = Recorded()
    with recorded:
        result = run()
    return recorded.replay, result, pool
