import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--one-case", action="store_true", help="of a parametrised test, run the first case that is selected"
    )


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--one-case"):
        return
    first = {}
    for item in items:
        first.setdefault((item.path, item.nodeid.split("[")[0]), item)
    chosen = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and leaves the backend switch at "auto"."""
    from u2a_fast.kernels import set_backend

    torch.manual_seed(0)
    yield
    set_backend("auto")
