"""Planned against measured memory of a running stage."""

import heapq
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from components.rlhf.planner.copies import Numeric
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.other_stages import plan_evaluation
from components.rlhf.planner.phases import GIB, StagePlan
from components.rlhf.planner.ppo_stage import plan_ppo
from components.rlhf.planner.processor import has_bf16
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.sources import shape_of_folder
from components.rlhf.planner.training_stages import plan_reward_model, plan_sft

if TYPE_CHECKING:  # register and notify run where torch is not installed
    from components.rlhf.engine.protocol import Group

STATUS = Path("/proc/self/status")


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


def plan_here(stage: str, config: Any, paths: Mapping[str, Path], *, checkpoints: bool) -> StagePlan | None:
    """The plan of a training stage or an evaluation from its settings, and the models and texts that it reads; None for other stages."""
    if stage not in READS:
        return None
    import torch  # register and notify run where it is not installed

    from components.rlhf.data.datasets import read_header

    plan, model, data = READS[stage]
    shape, on_gpu = shape_of_folder(paths[model]), torch.cuda.is_available()
    imported = paths["base_model"] if stage == "reward_model" and config.reward_model.use else None
    reward_model = imported or paths.get("reward_model")
    text_tokens = read_header(paths[data]).max_tokens
    found: StagePlan = plan(
        config,
        Job(
            shape=shape,
            reward_shape=shape_of_folder(reward_model) if reward_model else None,
            judge_shape=_largest_judge(paths["judge"]) if "judge" in paths else None,
            numeric=Numeric(bf16=has_bf16(config.model.precision, on_gpu=on_gpu), on_gpu=on_gpu),
            prompt_tokens=_longest_prompt(paths["prompts"], paths[model]) if "prompts" in paths else text_tokens,
            text_tokens=text_tokens,
            gpu_memory=torch.cuda.mem_get_info()[1] if on_gpu else None,
            checkpoints=checkpoints,
        ),
    )
    return found


def _largest_judge(folder: Path) -> ModelShape | None:
    """The largest reward model in a judge artifact, if there is one."""
    shapes = [shape_of_folder(file.parent) for file in folder.glob("*/config.json")]
    return max(shapes, key=lambda shape: shape.total, default=None)


def _longest_prompt(data: Path, model: Path) -> int:
    """Tokens of the longest prompt of all splits; only those of the longest lines are counted."""
    from components.rlhf.data.lengths import longest_prompt
    from components.rlhf.data.records import Prompt
    from components.rlhf.data.tokenizer import load_tokenizer

    lines = heapq.nlargest(16, (line for path in data.glob("*.jsonl") for line in path.open("rb")), key=len)
    prompts = [TypeAdapter(Prompt).validate_json(line) for line in lines]
    return longest_prompt(prompts, load_tokenizer(model))


# Of each stage: what plans it, its model, and its texts.
READS: dict[str, tuple[Callable[[Any, Job], StagePlan], str, str]] = {
    "sft": (plan_sft, "base_model", "demonstrations"),
    "reward_model": (plan_reward_model, "sft_model", "preferences"),
    "ppo": (plan_ppo, "sft_model", "prompts"),
    "evaluation": (plan_evaluation, "sft_model", "prompts"),
}
