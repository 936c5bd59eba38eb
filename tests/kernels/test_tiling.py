"""How exactly a GPU multiplies fp32: by what the user has switched on."""

import subprocess
import sys

import pytest
import torch

from u2a_fast.kernels.tiling import dot_precision

# (what is switched, in this order, and what holds then). The first line is what TrainingArguments(tf32=True) does.
SWITCHES = {
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'ieee'": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = False": "ieee",
}


@pytest.mark.slow
def test_tf32_is_used_however_it_was_allowed():
    """In a process of its own: PyTorch does not forget that its newer switch was touched."""
    code = "import torch; from u2a_fast.kernels.tiling import dot_precision as of; print(of(), of(torch.bfloat16))\n"
    code += "\n".join(f"{switch}; print(of(), of(torch.bfloat16))" for switch in SWITCHES)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["ieee ieee", *(f"{held} ieee" for held in SWITCHES.values())], done.stderr


def test_amd_gpus_multiply_fp32_exactly(monkeypatch):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert dot_precision() == "tf32"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert dot_precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
