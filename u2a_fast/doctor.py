"""What this machine has, which paths will run on it, and what each missing package costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .kernels.backend import interpreting, triton
from .kernels.targets import has_bfloat16, supports_triton
from .quantization import fast_dtype, slower_than_float32

OPTIONAL = {
    "bitsandbytes": "no nf4 encoders, no 8-bit optimizer, no encoders loaded with BitsAndBytesConfig",
    "flash_attn": "texts of unequal lengths on a GPU through torch's varlen attention instead of flash-attn's",
    "peft": "no comparison with PEFT in the benches",
    "soundfile": "no audio files",
    "scipy": "no resampling of audio",
    "av": "no video files, no AAC or M4A",
}


def int8_path() -> str:
    """How int8 products run on this machine."""
    if torch.cuda.is_available():
        return "int8: weights dequantised per tile; int8_w8a8: int8 tensor cores"
    if torch.cpu._is_vnni_supported():
        return "int8: weights dequantised per use; int8_w8a8: torch._int_mm with VNNI"
    return f"int8: weights dequantised per use; int8_w8a8: {slower_than_float32(torch.float32, 'int8_w8a8')}"


def findings() -> dict[str, str]:
    """What `u2a-fast doctor` prints, by name."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()} (CPU)"
    found = {
        "device": f"{device}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "u2a-fast")},
        "triton": importlib.metadata.version("triton") if triton is not None else "not installed",
        **backends(),
        "bfloat16": "in hardware" if has_bfloat16() else f"{slower_than_float32(torch.bfloat16)}",
        "dtype auto": str(fast_dtype()).removeprefix("torch."),
        "int8 encoders": int8_path(),
    }
    for name, cost in OPTIONAL.items():
        spec = importlib.util.find_spec(name)
        found[name] = "found" if spec is not None else f"not installed: {cost}"
    return found


def backends() -> dict[str, str]:
    """What the backend `auto` is on every visible device, and why."""
    if not torch.cuda.is_available():
        return {"backend": "auto -> torch" + (" (Triton's interpreter is on)" if interpreting() else "")}
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        f"backend on {gpu}": f"bf16: {_auto(gpu, torch.bfloat16)}; fp32: {_auto(gpu, torch.float32)}" for gpu in gpus
    }


def _auto(device: torch.device, dtype: torch.dtype) -> str:
    supported, why = supports_triton(device, dtype) if triton is not None else (False, "Triton is not installed")
    return f"auto -> {'triton' if supported else 'torch'} ({why})"


def print_findings() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "finding", title="u2a-fast doctor")
    for name, finding in findings().items():
        table.add_row(name, finding)
    Console().print(table)


def prove_kernels() -> bool:
    """Run the GPU report's step (c), print its page, and say whether every result was right."""
    command = [sys.executable, "-m", "u2a_fast.gpu_report", "--steps", "c", "--minutes", "0.95"]
    if not torch.cuda.is_available():
        print("no GPU: the same checks in tiny sizes on the CPU, through ATen")
        command.append("--dry")
    with tempfile.TemporaryDirectory() as folder:
        proved = subprocess.run([*command, "--out", folder], stdout=subprocess.DEVNULL).returncode == 0
        page = Path(folder) / "README.md"
        print(page.read_text() if page.exists() else "the report did not run")
    return proved
