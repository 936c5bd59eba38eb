import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and leaves the backend switch at "auto"."""
    from u2a_fast.kernels import set_backend

    torch.manual_seed(0)
    yield
    set_backend("auto")
