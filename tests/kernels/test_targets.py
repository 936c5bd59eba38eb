"""Which GPUs and dtypes get Triton, with stand-ins for the GPUs."""

from types import SimpleNamespace

import pytest
import torch

from u2a_fast.kernels import targets
from u2a_fast.kernels.targets import supports_triton


@pytest.fixture
def gpus(monkeypatch):
    """Give `torch.cuda` these GPUs; yields the function that does, and the list of the indices it was asked for."""
    asked = []

    def install(*names):
        amd = names[0].startswith("gfx")

        def capability(index):
            asked.append(index)
            return divmod(int(names[index][3:]), 10)

        def properties(index):
            asked.append(index)
            return SimpleNamespace(gcnArchName=names[index])

        monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: len(names) - 1)
        return asked

    targets._gpu_supports.cache_clear()
    yield install
    targets._gpu_supports.cache_clear()


def gpu(index=0):
    return torch.device("cuda", index)


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a:sramecc+", "gfx942"])
def test_half_precision_runs_on_what_has_the_room_and_wider_dtypes_nowhere(gpus, name):
    gpus(name)
    for dtype in (torch.bfloat16, torch.float16):
        assert supports_triton(gpu(), dtype)[0]
    for dtype in (torch.float32, torch.float64, torch.int8):
        supported, why = supports_triton(gpu(), dtype)
        assert not supported and str(dtype)[6:] in why


@pytest.mark.parametrize("name, why", [("sm_75", "sm_80 or newer"), ("gfx1100", "gfx90a and gfx942")])
def test_what_is_too_old_or_unknown_is_named(gpus, name, why):
    gpus(name)
    supported, sentence = supports_triton(gpu(), torch.bfloat16)
    assert not supported and why in sentence and name in sentence


def test_every_gpu_is_asked_once_and_answers_for_itself(gpus):
    asked = gpus("sm_75", "sm_90")
    for _ in range(3):
        assert not supports_triton(gpu(0), torch.bfloat16)[0]
        assert supports_triton(gpu(1), torch.bfloat16)[0]
    assert supports_triton(torch.device("cuda"), torch.bfloat16)[0]  # the current one
    assert asked == [0, 1]


def test_other_devices_have_no_triton():
    for device in ("cpu", "meta", "mps"):
        assert supports_triton(torch.device(device), torch.bfloat16) == (
            False,
            f"Triton compiles for GPUs, not for a {device}",
        )
