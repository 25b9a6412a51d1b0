"""What the kernel says of this machine: free memory, and whether the processor computes in bf16."""

from pathlib import Path

from components.rlhf.config.model import Precision


def has_bf16(precision: Precision, *, on_gpu: bool) -> bool:
    """Whether stages on this machine compute in bf16; as models/precision.py, which asks torch where there is a GPU."""
    if precision != "auto" or on_gpu:
        return precision != "fp32"
    flags = _read("/proc/cpuinfo")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def available_memory() -> int | None:
    """Bytes that programs can still take, or None where the kernel does not say."""
    lines = _read("/proc/meminfo").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:  # not Linux
        return ""
