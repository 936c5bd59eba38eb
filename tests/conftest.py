import gc
import os
import tempfile

import pytest
import torch

GPUS = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
DEVICES = [
    pytest.param(torch.device("cpu"), id="cpu"),
    *(pytest.param(gpu, id=str(gpu), marks=pytest.mark.cuda) for gpu in GPUS),
]


def pytest_addoption(parser):
    parser.addoption(
        "--one-case", action="store_true", help="of a parametrised test, run the first case that is selected"
    )


def pytest_configure(config):
    """What torch.compile builds lies in a folder of this run: a killed one leaves half a library in the usual place."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # workers have that of the process that started them
        folder = tempfile.TemporaryDirectory(prefix="u2a-fast-compiled-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


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


def pytest_collection_finish():
    """What was imported is no garbage: to look through it takes half a second, and every Trainer asks for that."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _as_failure((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _as_failure((yield))


def _as_failure(report):
    """Where everything is installed, as in CI, nothing may be skipped but what does not fit a GPU."""
    skipped = report.skipped and not hasattr(report, "wasxfail") and "cuda" not in getattr(report, "keywords", ())
    if skipped and os.environ.get("U2A_FAST_NO_SKIPS") == "1":
        report.outcome, report.longrepr = "failed", f"{report.longrepr[2]} (fails under U2A_FAST_NO_SKIPS=1)"
    return report


def pytest_runtest_setup(item):
    """Four-bit weights are packed by bitsandbytes."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(isinstance(value, str) and value == "nf4" for value in values):
        pytest.importorskip("bitsandbytes")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """The CPU, then every GPU: what is computed there is compared with what a CPU says."""
    if request.param.type == "cuda":  # convolutions would round fp32 to TF32, which products do on request only
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from one seed and leaves the backend switch at "auto"."""
    from u2a_fast.kernels import set_backend

    torch.manual_seed(0)
    yield
    set_backend("auto")
