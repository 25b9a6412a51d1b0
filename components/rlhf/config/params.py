"""The whole params file, and the part of it that each stage is given."""

from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.cluster import TRAINING_STAGES, ClusterConfig
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.config.judge import JudgeConfig
from components.rlhf.config.model import ModelConfig, Seed, reject_zero3_with_shared_weights
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.config.reward_model import RewardModelConfig
from components.rlhf.config.sft import SftConfig
from components.rlhf.config.storage import CheckpointConfig, StorageConfig, TrackingConfig

Stage = TypeVar("Stage", bound=BaseConfig)
MAX_SHOWN, MAX_VALUE_CHARS = 5, 120  # mistakes, and characters of a value


class Params(BaseConfig):
    """One run of the pipeline."""

    preset: str = "custom"
    """A name for these settings; it is shown in the summary."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    judge: JudgeConfig = JudgeConfig()
    ppo: PpoConfig = PpoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    storage: StorageConfig = StorageConfig()
    cluster: ClusterConfig = ClusterConfig()
    seed: Seed = 0
    """Of the splits, the orders, the fresh heads and all sampling."""

    @model_validator(mode="after")
    def _sources(self) -> "Params":
        if self.data.demonstrations is None and self.sft.use is None:
            raise ValueError("data.demonstrations is missing; name a source, or your own model in sft.use")
        for section in (self.sft, self.reward_model, self.ppo):
            head_only = isinstance(section, PpoConfig) and section.critic.trains == "head"
            reject_zero3_with_shared_weights(self.model, section.training, head_only=head_only)
        if self.data.max_prompt_tokens >= self.data.max_tokens:
            raise ValueError("data.max_prompt_tokens leaves no room for a completion; raise data.max_tokens above it")
        return self

    @model_validator(mode="after")
    def _one_process_each(self) -> "Params":
        for stage in TRAINING_STAGES:
            num, training = self.cluster.num_accelerators(stage), getattr(self, stage).training
            if num and training.num_processes != num and getattr(getattr(self, stage), "use", None) is None:
                profile = self.cluster.stages.get(stage, self.cluster.default_profile)
                raise ValueError(
                    f"{stage}.training.num_processes is {training.num_processes}, and the profile {profile} has {num} accelerators; "
                    "leave num_processes out"
                )
        return self

    def stage(self, stage: type[Stage]) -> Stage:
        """The settings that one stage reads: the sections that its model names, nothing else."""
        sections: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        sections["num_evaluation_prompts"] = self.evaluation.num_prompts
        sections["sampling"] = self.ppo.rollout.sampling  # the reward model is calibrated on what PPO will sample
        if "evaluation" in stage.model_fields:
            sections["sampling"] = self.evaluation.sampling or self.ppo.rollout.sampling
        return stage(**{name: sections[name] for name in stage.model_fields})


def explain_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One clear sentence per mistake: the key, what is wrong with it, and the nearest valid key of a misspelt one."""
    mistakes = error.errors(include_url=False)
    text = "; ".join(_explain_one(dict(mistake), model) for mistake in mistakes[:MAX_SHOWN])
    if len(mistakes) > MAX_SHOWN:
        text += f"; and {len(mistakes) - MAX_SHOWN} more"
    return text if text.endswith("?") else f"{text}."


def short_repr(value: object) -> str:
    """A value as part of a sentence: one line, and not longer than one."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python writes
        return "a number with thousands of digits"
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 20]}... ({len(text):,} characters)"


def _explain_one(mistake: dict[str, Any], model: type[BaseModel]) -> str:
    path = [_key(part) for part in mistake["loc"]]
    key = ".".join(path) or "the parameters"
    if mistake["type"] == "extra_forbidden":
        valid = _keys_at(model, path[:-1])
        near = get_close_matches(path[-1], valid, n=1, cutoff=0.5)
        where = ".".join([*path[:-1], near[0]]) if near else ""
        hint = f"did you mean {where}?" if near else f"valid here: {', '.join(valid) or 'nothing'}"
        return f"{key} is not a parameter; {hint}"
    if mistake["type"] == "missing":
        return f"{key} is missing"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {short_repr(mistake['input'])}: {message[0].lower()}{message[1:]}"


def _key(part: str | int) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= MAX_VALUE_CHARS else short_repr(text)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Valid keys of the section at path. A name in a mapping of sections, or a number in a list of them, leads into the section."""
    parts = iter(path)
    for part in parts:
        field = model.model_fields.get(part)
        nested = (
            [t for t in _types_of(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
            if field
            else []
        )
        if not nested:
            return []
        model = nested[0]
        if field and getattr(field.annotation, "__origin__", None) in (dict, tuple):
            next(parts, None)
    return list(model.model_fields)


def _types_of(annotation: Any) -> list[Any]:
    return [annotation, *getattr(annotation, "__args__", ())]
