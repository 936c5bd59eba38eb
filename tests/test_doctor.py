"""`u2a-fast doctor` on machines that are not this one."""

import pytest
import torch

from u2a_fast import doctor
from u2a_fast.kernels import targets


@pytest.fixture
def two_gpus(monkeypatch):
    """A T4 and an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    targets._gpu_supports.cache_clear()
    yield
    targets._gpu_supports.cache_clear()


def test_doctor_says_what_runs_on_every_gpu_and_why(two_gpus):
    found = doctor.backends()
    assert list(found) == ["backend on cuda:0", "backend on cuda:1"]
    assert found["backend on cuda:0"].count("auto -> torch (our Triton kernels need sm_80 or newer") == 2
    assert "bf16: auto -> triton (sm_90 holds tiles of bfloat16)" in found["backend on cuda:1"]
    assert "fp32: auto -> torch (tiles of float32" in found["backend on cuda:1"]


def test_doctor_says_that_triton_is_not_installed(two_gpus, monkeypatch):
    monkeypatch.setattr(doctor, "triton", None)
    assert doctor.backends()["backend on cuda:1"].count("auto -> torch (Triton is not installed)") == 2


def test_an_old_gpu_has_no_bfloat16(two_gpus, monkeypatch):
    for major, has in ((7, False), (8, True)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        properties = type("Properties", (), {"major": major})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert targets.has_bfloat16() is has
