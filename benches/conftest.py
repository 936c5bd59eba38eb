"""What holds for every bench and all its arms: one start, all cores or one, memory kept as training keeps it.

Smoke runs test plumbing and time nothing.
"""

import arms
import pytest
import torch

from u2a_fast.allocator import keep_freed_memory
from u2a_fast.kernels import keep_turned_weights


@pytest.fixture(autouse=True)
def _same_start(request, monkeypatch):
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    if "smoke" in request.node.name:
        torch.set_num_threads(1)  # tensors this small take longer on two
        monkeypatch.setattr(arms, "GEMM_ROWS", 16)
    with keep_freed_memory(), keep_turned_weights():  # which PEFT's arms gain nothing by: their products are MKL's
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
