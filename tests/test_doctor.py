"""`u2a-fast doctor` on machines that are not this one."""

import pytest
import tiny_encoders
import torch

from u2a_fast import doctor
from u2a_fast.encoders import from_pretrained_model
from u2a_fast.encoders.frozen import quantize_encoder
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


@pytest.fixture
def old_cpu(monkeypatch):
    """A CPU without AVX-512, and no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture
def new_cpu(old_cpu, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)


def test_doctor_says_which_modes_are_slower_than_float32(old_cpu):
    found = doctor.findings()
    assert "as long as in float32" in found["int8 encoders"]
    assert "as long as float32" in found["bfloat16"] and found["dtype auto"] == "float32"


def test_a_cpu_that_multiplies_them_is_warned_of_nothing(new_cpu, recwarn):
    assert doctor.findings()["dtype auto"] == "bfloat16"
    quantize_encoder(from_pretrained_model(tiny_encoders.build("bert").bfloat16()), "int8_w8a8")
    assert not [w for w in recwarn if "float32" in str(w.message)]


def test_an_encoder_that_would_be_slower_than_in_float32_says_so(old_cpu):
    with pytest.warns(UserWarning, match="bfloat16 in hardware"):
        encoder = from_pretrained_model(tiny_encoders.build("bert").bfloat16())
    with pytest.warns(UserWarning, match="no VNNI"):
        quantize_encoder(encoder, "int8_w8a8")


def test_the_int8_path_is_named():
    assert ("VNNI" in doctor.int8_path()) != torch.cuda.is_available()
