"""Small PPO runs, against a reward model or against any function of token ids."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from components.ppo.experience import Models
from components.ppo.models import load_models
from components.ppo.trainer import PpoTrainer
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.model import LoraConfig, ModelConfig
from components.rlhf.config.ppo import PpoConfig, PpoStageConfig
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.environments.factory import open_player
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.saving import save_model
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.rewards.rewards import Rewards
from components.rlhf.rollout.hf import HfRolloutEngine
from tests.support.training import NEVER, context_of

PROMPTS = [Prompt(prompt=text, id=f"prompt-{i}") for i, text in enumerate(["It is", "We", "A film that", "So", "It"])]
VALIDATION = [Prompt(prompt=text, id=f"validation-{i}") for i, text in enumerate(["It was", "I", "One film"])]
FP32, CPU = torch.float32, torch.device("cpu")
Row = dict[str, float]


class RewardFunction:
    """A scorer by a function of (prompt ids, response ids)."""

    def __init__(self, function: Callable[[list[int], list[int]], float]) -> None:
        self.function = function

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        return torch.tensor([self.function(c.prompt_ids, c.response_ids) for c in completions])


def rewards_of(models: Models) -> Rewards:
    """The scorer of the models as the only reward."""
    assert models.scorer is not None
    return Rewards(scorers={"reward_model": models.scorer}, weights={"reward_model": 1.0})


def share_of_low_ids(prompt_ids: list[int], response_ids: list[int]) -> float:
    return sum(token < 128 for token in response_ids) / len(response_ids)


def make_reward_model(
    sft: Path, folder: Path, *, mean: float = 0.2, std: float = 1.5, seed: int = 1, head_scale: float = 20.0
) -> Path:
    """A reward model on the layers of sft, with a head that gives clearly different scores."""
    lm = load_scalar_lm(sft, num_frozen_layers=0, dtype=FP32, seed=seed)
    with torch.no_grad():
        lm.score.weight.mul_(head_scale)
    lm.config.reward_mean, lm.config.reward_std = mean, std
    save_model(lm, AutoTokenizer.from_pretrained(sft), folder, dtype=FP32)
    return folder


def config_of(*, frozen: int = 0, seed: int = 3, lora: LoraConfig | None = None, **ppo: Any) -> PpoStageConfig:
    """Settings of a run; rollout, sampling, training and critic are merged into small defaults."""
    sampling = {"max_new_tokens": 6, "batch_size": 8} | ppo.pop("sampling", {})
    rollout = {"num_prompts": 8, "sampling": sampling} | ppo.pop("rollout", {})
    training = {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0} | ppo.pop("training", {})
    critic = {"learning_rate": 1e-3} if ppo.get("advantage", "gae") == "gae" else {}
    critic |= ppo.pop("critic", {})
    merged = {"num_iterations": 2, "minibatch": 4, "rollout": rollout, "training": training, "critic": critic}
    return PpoStageConfig(
        model=ModelConfig(num_frozen_layers=frozen, precision="fp32", lora=lora),
        ppo=PpoConfig(**(merged | ppo)),
        checkpoint=CheckpointConfig(),
        seed=seed,
    )


def load(config: PpoStageConfig, sft: Path, reward_model: Path | None) -> tuple[Models, HfRolloutEngine]:
    return load_models(config, sft, reward_model, dtype=FP32, prompts=[])


def trainer_of(
    config: PpoStageConfig,
    sft: Path,
    reward_model: Path | None,
    *,
    reward: Callable[[list[int], list[int]], float] | None = None,
    checkpoints: CheckpointManager | None = None,
    interrupt_at: int = NEVER,
) -> PpoTrainer:
    models, rollout = load(config, sft, reward_model)
    if reward is not None:
        models = replace(models, scorer=RewardFunction(reward))
    rewards = rewards_of(models)
    context = context_of("ppo", checkpoints=checkpoints, interrupt_at=interrupt_at)
    player = open_player(rollout, config.ppo.environment, log=context.progress.log)
    return PpoTrainer(config, models, rewards, rollout, context, player=player)


def weights(trainer: PpoTrainer) -> dict[str, Tensor]:
    modules = (("actor", trainer.learner.models.actor), ("critic", trainer.learner.models.critic))
    return {
        f"{kind}.{name}": p.detach().clone() for kind, m in modules if m is not None for name, p in m.named_parameters()
    }


def without_times(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds/")} for row in rows]


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def completion(
    prompt_ids: list[int], response_ids: list[int], *, truncated: bool = False, prompt: str = "a prompt"
) -> Completion:
    return Completion(
        prompt=Prompt(prompt=prompt),
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        response="a response",
        logprobs=torch.full((len(response_ids),), -1.0),
        truncated=truncated,
    )
