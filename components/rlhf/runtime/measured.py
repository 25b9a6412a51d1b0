"""Planned against measured memory of a running stage."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.rlhf.planner.phases import GIB, StagePlan

if TYPE_CHECKING:  # register and notify run where torch is not installed
    from components.rlhf.engine.protocol import Group

STATUS = Path("/proc/self/status")
PLANNED_STAGES = ("sft", "reward_model", "ppo", "dpo", "evaluation")


@dataclass
class StageMemory:
    """What a stage was planned to hold in each process, and the most that any of its processes has held, in bytes."""

    plan: StagePlan | None = None
    main_peak: int = 0
    gpu_peak: int = 0

    def observe(self, group: "Group | None" = None) -> None:
        """Take the peaks of this process, and those of all ranks of a group that is still open; they all call this together."""
        own = [(main_peak(), gpu_peak())]
        for main, gpu in group.gather(own) if group is not None and _is_open(group) else own:
            self.main_peak, self.gpu_peak = max(self.main_peak, main), max(self.gpu_peak, gpu)

    def numbers(self, *, saved: bool) -> dict[str, float]:
        """memory/planned_gib and memory/peak_gib, of main memory or, on a GPU, of its own. saved: whether a checkpoint was written."""
        on_gpu = self.gpu_peak > 0
        numbers = {"memory/peak_gib": round((self.gpu_peak if on_gpu else self.main_peak) / GIB, 3)}
        if on_gpu:
            numbers["memory/main_peak_gib"] = round(self.main_peak / GIB, 3)
        if self.plan is not None:
            without = () if saved else ("checkpoint",)
            _, planned = self.plan.device_peak() if on_gpu else self.plan.main_peak(without=without)
            numbers["memory/planned_gib"] = round(planned / GIB, 3)
        return numbers


def _is_open(group: "Group") -> bool:
    if group.world_size == 1:
        return True
    import torch.distributed

    return torch.distributed.is_initialized()


def sentence(numbers: dict[str, float]) -> str:
    """The numbers of a stage in one line."""
    planned = numbers.get("memory/planned_gib")
    text = f"memory: {numbers['memory/peak_gib']:.2f} GiB at most in a process"
    return text if planned is None else f"{text}, planned {planned:.2f}"


def main_peak() -> int:
    """The largest resident set that this process has had, in bytes."""
    try:
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gpu_peak() -> int:
    """The most memory that torch has reserved on the GPU of this process, with what is outside of its allocator; 0 without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    outside = max(total - free - torch.cuda.memory_reserved(), 0)
    return int(torch.cuda.max_memory_reserved() + outside)
