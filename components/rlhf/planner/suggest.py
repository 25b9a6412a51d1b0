"""What to turn when a stage does not fit: the smallest set of settings with which the planner itself says that it does."""

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from components.rlhf.config.cluster import TRAINING_STAGES
from components.rlhf.config.params import Params
from components.rlhf.planner.phases import GIB
from components.rlhf.planner.plan import Machine, Shapes, judge_plan, machine_of, plan_stage, saves_checkpoints

MAX_TOGETHER = 3  # settings in one suggestion
Changes = Mapping[str, Any]  # dotted key -> value


def suggest(params: Params, shapes: Shapes, stage: str, machine: Machine | None = None) -> list[str]:
    """Settings as KEY=VALUE that make the stage fit, fewest first; [] if none were found. machine replaces the profile."""
    options = list(_candidates(params, shapes, stage))
    for count in range(1, MAX_TOGETHER + 1):
        for chosen in combinations(options, count):
            keys = [key for changes in chosen for key in changes]
            if len(set(keys)) < len(keys):
                continue
            changes = {key: value for changes in chosen for key, value in changes.items()}
            if _fits(params, shapes, stage, changes, machine):
                return [f"{key}={_text(value)}" for key, value in changes.items()]
    return []


def changed(params: Params, changes: Changes) -> Params | None:
    """The parameters with these changes, or None if they contradict each other."""
    content = params.model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section[part] = section.get(part) or {}
            section = section[part]
        section[name] = value
    try:
        return Params.model_validate(content)
    except ValidationError:
        return None


def _fits(params: Params, shapes: Shapes, stage: str, changes: Changes, machine: Machine | None) -> bool:
    other = changed(params, changes)
    if other is None:
        return False
    found = machine or machine_of(other.cluster.profile(stage), other.model.precision)
    plan = plan_stage(other, shapes, stage, found, checkpoints=saves_checkpoints(other))
    return judge_plan(plan, found).text in ("fits", "tight")


def _candidates(params: Params, shapes: Shapes, stage: str) -> Iterator[Changes]:
    """Single changes, those that cost least first."""
    if stage in TRAINING_STAGES:
        yield from _training(params, stage)
    sampling = params.ppo.rollout.sampling
    if stage in ("ppo", "evaluation", "reward_model"):
        sizes = [sampling.batch_size // 2**power for power in (1, 2, 3) if sampling.batch_size // 2**power]
        yield from ({"ppo.rollout.sampling.batch_size": size} for size in sizes)
    if stage == "evaluation" and params.evaluation.num_processes > 1 and params.evaluation_rollout.engine == "vllm":
        yield {"evaluation.shard_weights": True}
    if (
        stage in ("ppo", "reward_model") + (() if params.evaluation.rollout else ("evaluation",))
        and params.ppo.rollout.engine == "vllm"
    ):
        share = params.ppo.rollout.vllm.gpu_memory_utilization
        yield from (
            {"ppo.rollout.vllm.gpu_memory_utilization": round(share * part, 2)}
            for part in (0.75, 0.5, 1.5, 2.0)
            if share * part < 0.9
        )
    yield from _memory(params, shapes, stage)
    if stage in TRAINING_STAGES and params.model.lora is None:
        yield {"model.lora": {}}


def _training(params: Params, stage: str) -> Iterator[Changes]:
    training, key = getattr(params, stage).training, f"{stage}.training"
    if not training.gradient_checkpointing:
        yield {f"{key}.gradient_checkpointing": True}
    longest = max(params.data.max_tokens, params.data.max_prompt_tokens + params.ppo.longest_sampling.max_new_tokens)
    tokens = training.microbatch_tokens // 2
    while tokens >= longest:
        yield {f"{key}.microbatch_tokens": tokens}
        tokens //= 2
    if training.num_processes > 1:
        stages = (2, 3) if training.engine == "torch" else range(training.zero_stage + 1, 4)
        yield from ({f"{key}.engine": "deepspeed", f"{key}.zero_stage": zero} for zero in stages)
    if not training.offload_optimizer:
        yield {f"{key}.offload_optimizer": True} | (
            {} if training.engine == "deepspeed" else {f"{key}.engine": "deepspeed"}
        )


def _memory(params: Params, shapes: Shapes, stage: str) -> Iterator[Changes]:
    """As much main memory as the stage needs, in steps of 8 GiB."""
    name = params.cluster.profile_name(stage)
    machine = machine_of(params.cluster.profile(stage), params.model.precision)
    needed = plan_stage(params, shapes, stage, machine).pod_memory()
    if machine.memory is not None and needed > machine.memory:
        yield {f"cluster.profiles.{name}.memory": f"{-(-needed // (8 * GIB)) * 8}Gi"}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)
