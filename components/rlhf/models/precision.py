"""Where and in what precision models compute."""

import contextlib
from pathlib import Path

import torch

from components.rlhf.config.model import Precision


def default_device() -> torch.device:
    """The GPU that this process has chosen, or the processor."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(precision: Precision) -> torch.dtype:
    """bf16 where it is asked for, or with auto where the processor multiplies in it; else fp32."""
    if precision == "auto":
        return torch.bfloat16 if _has_bf16() else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast_to(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Matrix products in dtype, weights in whatever they are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    # Without bf16 instructions a CPU emulates them, slower than fp32. torch has no public question for it.
    cpu_info = Path("/proc/cpuinfo")
    flags = cpu_info.read_text() if cpu_info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
