"""Which GPUs our Triton kernels run on, and for which dtypes: what `auto` asks before it chooses them.

Tiles of bf16 and fp16 fit an A100, an MI200 and all that came after. Those of fp32 take twice the room: they exceed the
shared memory of an RTX 4090 and of an MI300X, and spill elsewhere. Before sm_80, Triton multiplies bf16 in software.
"""

from __future__ import annotations

import functools

import torch

DTYPES = (torch.bfloat16, torch.float16)
OLDEST_NVIDIA = 80
AMD = ("gfx90a", "gfx942")


def supports_triton(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether our kernels run on `device` for activations of `dtype`, and why. A GPU is asked for its name once.

    >>> supports_triton(torch.device("cpu"), torch.bfloat16)
    (False, 'Triton compiles for GPUs, not for a cpu')
    """
    if device.type != "cuda":
        return False, f"Triton compiles for GPUs, not for a {device.type}"
    return _gpu_supports(torch.cuda.current_device() if device.index is None else device.index, dtype)


@functools.cache
def _gpu_supports(index: int, dtype: torch.dtype) -> tuple[bool, str]:
    target = architecture(index)
    nvidia = target.startswith("sm_")
    if nvidia and int(target[3:]) < OLDEST_NVIDIA:
        return False, f"our Triton kernels need sm_{OLDEST_NVIDIA} or newer, and this is {target}"
    if not nvidia and target not in AMD:
        return False, f"our Triton kernels are compiled for {' and '.join(AMD)}, and this is {target}"
    if dtype not in DTYPES:
        return False, f"tiles of {str(dtype).removeprefix('torch.')} fit neither registers nor shared memory"
    return True, f"{target} holds tiles of {str(dtype).removeprefix('torch.')}"


def architecture(index: int) -> str:
    """The compiler's name of a GPU: `sm_90`, `gfx942`."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]  # gfx90a:sramecc+:xnack-
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def has_bfloat16() -> bool:
    """Whether the current GPU, or the CPU where there is none, multiplies bf16 in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


@functools.cache
def multiplied_by_cpu(dtype: torch.dtype) -> bool:
    """Whether PyTorch has a product of this half precision on this CPU: oneDNN's, which asks for AVX-512 on x86."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster on this CPU than MKL, which PyTorch asks: without AVX-512."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and torch.backends.cpu.get_cpu_capability() == "AVX2"


def has_int8() -> bool:
    """Whether the current GPU, or the CPU where there is none, multiplies int8 in hardware."""
    return torch.cuda.is_available() or torch.cpu._is_vnni_supported()
