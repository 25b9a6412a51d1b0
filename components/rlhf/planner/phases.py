"""Records of a plan: what a process holds in each phase of a stage, by what it is."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one process holds at the peak of a phase, in bytes: on its GPU, and in main memory. Without a GPU all is in main memory."""

    name: str  # load, generate, score, KL, judge, update, step, sync, checkpoint or export
    device: Mapping[str, int]
    main: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The phases of a stage in each of its processes. beside is the main memory of the pod's other programs."""

    stage: str
    num_processes: int
    on_gpu: bool
    phases: tuple[Phase, ...]
    beside: int = 0
    pods: int = 1  # that the processes are in
    notes: tuple[str, ...] = ()
    problem: str = ""  # why it cannot run in any memory, as the end of a sentence

    def device_peak(self) -> tuple[str, int]:
        """The phase in which a process holds most on its GPU, and the bytes; 0 without a GPU."""
        return self._peak({phase.name: sum(phase.device.values()) for phase in self.phases} if self.on_gpu else {})

    def main_peak(self, *, without: tuple[str, ...] = ()) -> tuple[str, int]:
        """The phase in which a process holds most in main memory, and the bytes. without names phases that did not happen."""
        return self._peak({p.name: self.main_of(p) for p in self.phases if p.name not in without})

    def main_of(self, phase: Phase) -> int:
        return sum(phase.main.values()) + (0 if self.on_gpu else sum(phase.device.values()))

    def pod_memory(self) -> int:
        """Main memory of one pod: of its processes, and of the programs beside them."""
        return self.processes_per_pod * self.main_peak()[1] + self.beside

    @property
    def processes_per_pod(self) -> int:
        return -(-self.num_processes // self.pods)

    def parts(self, phase_name: str, *, main: bool = False) -> dict[str, int]:
        """The parts of a phase, largest first: on a GPU, or in main memory with `main` or without a GPU."""
        phase = next(phase for phase in self.phases if phase.name == phase_name)
        parts = dict(phase.device) if self.on_gpu and not main else {**phase.main}
        if not self.on_gpu:
            for name, size in phase.device.items():
                parts[name] = parts.get(name, 0) + size
        return dict(sorted(((n, s) for n, s in parts.items() if s), key=lambda part: -part[1]))

    @staticmethod
    def _peak(sizes: Mapping[str, int]) -> tuple[str, int]:
        name = max(sizes, key=sizes.__getitem__, default="")
        return name, sizes.get(name, 0)


def add(*parts: Mapping[str, int]) -> dict[str, int]:
    """The sums of parts by name."""
    total: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + int(size)
    return total
