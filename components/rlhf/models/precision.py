"""The device and the precision of computations."""

import contextlib
from pathlib import Path

import torch

from components.rlhf.config.model import Precision


def default_device() -> torch.device:
    """The current GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of a precision; auto is bf16 if the hardware supports it, else fp32."""
    if precision == "auto":
        return torch.bfloat16 if _has_bf16() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast_to(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast to bf16 if dtype is bf16; otherwise a context without effect."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    # A CPU without bf16 instructions emulates them, slower than fp32; torch has no public API to ask for them.
    cpu_info = Path("/proc/cpuinfo")
    flags = cpu_info.read_text() if cpu_info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
