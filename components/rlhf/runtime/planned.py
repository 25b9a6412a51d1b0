"""The memory plan of a stage, from the settings, models and texts that it has."""

import heapq
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from components.rlhf.data.datasets import read_header
from components.rlhf.data.lengths import longest_prompt
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.planner.copies import Numeric
from components.rlhf.planner.jobs import Job
from components.rlhf.planner.other_stages import plan_evaluation
from components.rlhf.planner.phases import StagePlan
from components.rlhf.planner.ppo_stage import plan_ppo
from components.rlhf.planner.processor import has_bf16
from components.rlhf.planner.shape import ModelShape
from components.rlhf.planner.sources import shape_of_folder
from components.rlhf.planner.training_stages import plan_dpo, plan_reward_model, plan_sft


def plan_here(stage: str, config: Any, paths: Mapping[str, Path], *, checkpoints: bool) -> StagePlan:
    """The plan of a training stage or an evaluation from its settings, and the models and texts that it reads."""
    plan, model, data = READS[stage]
    shape, on_gpu = shape_of_folder(paths[model]), torch.cuda.is_available()
    imported = paths["base_model"] if stage == "reward_model" and config.reward_model.use else None
    reward_model = imported or paths.get("reward_model")
    header = read_header(paths[data])
    text_tokens = header.max_tokens
    if stage == "dpo" and not config.dpo.max_steps:  # what it keeps of its texts depends on how many there are
        steps = -(-header.sizes.get("train", 0) // config.dpo.batch_size)
        config = config.model_copy(update={"dpo": config.dpo.model_copy(update={"max_steps": steps})})
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
    lines = heapq.nlargest(16, (line for path in data.glob("*.jsonl") for line in path.open("rb")), key=len)
    prompts = [TypeAdapter(Prompt).validate_json(line) for line in lines]
    return longest_prompt(prompts, load_tokenizer(model))


# Of each stage: what plans it, its model, and its texts.
READS: dict[str, tuple[Callable[[Any, Job], StagePlan], str, str]] = {
    "sft": (plan_sft, "base_model", "demonstrations"),
    "reward_model": (plan_reward_model, "sft_model", "preferences"),
    "ppo": (plan_ppo, "sft_model", "prompts"),
    "dpo": (plan_dpo, "sft_model", "preferences"),
    "evaluation": (plan_evaluation, "sft_model", "prompts"),
}
