"""A check that torch finds the GPUs that a task has been given. Without it, a stage would train on the CPU for days."""

import os
import re
from pathlib import Path

from components.rlhf.text.errors import InputError

NUM_ACCELERATORS = "RLHF_NUM_ACCELERATORS"  # set by the pipeline on a cluster; elsewhere, a stage uses what it finds
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
# https://docs.nvidia.com/deploy/cuda-compatibility: the oldest driver branch of each CUDA major version
MIN_DRIVER = {12: 525, 13: 580}


def require_accelerators() -> None:
    """Raise InputError if torch finds fewer accelerators than the task has."""
    wanted = int(os.environ.get(NUM_ACCELERATORS) or 0)
    if not wanted:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < wanted:
        raise InputError(
            f"The task has {wanted} accelerators, but torch {torch.__version__} finds {found}: {_reason(torch.version.cuda or '')}."
        )


def _reason(cuda: str) -> str:
    if not cuda:
        return "the image has a torch without CUDA; build it without a folder of CPU wheels, or use a profile without accelerators"
    driver, needed = driver_version(), MIN_DRIVER.get(int(cuda.split(".")[0]))
    if driver is None:
        return "the container sees no NVIDIA driver; install NVIDIA's container toolkit on the node, or choose another node"
    if needed and int(driver.split(".")[0]) < needed:
        return f"CUDA {cuda} needs the driver R{needed} or newer, and the node has {driver}; update the driver, or choose another node"
    return f"the driver of the node is {driver}; look at nvidia-smi in the pod"


def driver_version() -> str | None:
    """The version of the loaded NVIDIA kernel driver, such as 580.65.06; None without one."""
    try:
        found = re.search(
            r"Kernel Module(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)", DRIVER_VERSION.read_text(encoding="utf-8")
        )
    except OSError:
        return None
    return found.group(1) if found else None
