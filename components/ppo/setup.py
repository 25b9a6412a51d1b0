"""Everything that PPO computes with: models, rewards, the rollout engine and the environment, put together into a trainer."""

from collections.abc import Sequence
from pathlib import Path

from components.ppo.models import load_models
from components.ppo.trainer import PpoTrainer
from components.rlhf.artifacts.code import open_code
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.records import Prompt
from components.rlhf.environments.factory import open_player
from components.rlhf.models.precision import compute_dtype
from components.rlhf.rewards.rewards import open_rewards
from components.rlhf.runtime.training import TrainingContext


def create_trainer(
    config: PpoStageConfig,
    context: TrainingContext,
    storage: StorageConfig,
    prompts: Sequence[Prompt],
    *,
    sft_model: Path,
    reward_model: Path | None,
    code: Path | None,
    demonstrations: Path | None,
) -> PpoTrainer:
    """The trainer of a run; prompts are all that it will sample for. Its close() ends the rewards and the rollout engine."""
    log = context.progress.log
    models, rollout = load_models(
        config,
        sft_model,
        reward_model,
        prompts=prompts,
        dtype=compute_dtype(config.model.precision),
        group=context.group,
    )
    log("all models share the frozen layers" if models.shared_trunk else "each model has its own layers")
    modules = open_code(code, config.code_digest)
    rewards = open_rewards(
        config.ppo.rewards,
        models.scorer,
        max_new_tokens=config.ppo.rollout.sampling.max_new_tokens,
        storage=storage,
        log=log,
        code=modules,
    )
    player = open_player(rollout, config.ppo.environment, log=log, code=modules)
    return PpoTrainer(config, models, rewards, rollout, context, demonstrations=demonstrations, player=player)
