"""Where the models of the comparison are, and how several processes share the work."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.model import TrainingConfig
from components.rlhf.engine.factory import (
    free_frozen_model,
    max_over_shards,
    prepare_frozen_model,
    shards_weights,
    weight_shards,
)
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.engine.shares import over_ranks
from components.rlhf.models.actor import Actor
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.rewards.protocol import Scorer
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rewards.shared import SharedScorer
from components.rlhf.runtime.memory import release_models


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of the stage. Every rank calls each method, in the same order and with the same arguments."""

    group: Group
    dtype: torch.dtype
    device: torch.device
    training: TrainingConfig  # names the engine and the stage of ZeRO that models are loaded for; nothing is trained
    loaded: list[torch.nn.Module] = field(default_factory=list)  # that are ready to compute

    @classmethod
    def of(cls, config: EvaluationStageConfig, group: Group = SINGLE_PROCESS) -> "Ranks":
        """Weights are sharded if the settings say so and there are several processes."""
        training = TrainingConfig()
        if config.evaluation.shard_weights and group.world_size > 1:
            training = TrainingConfig(engine="deepspeed", zero_stage=3, num_processes=group.world_size)
        return cls(group=group, dtype=compute_dtype(config.model.precision), device=default_device(), training=training)

    @property
    def shards_weights(self) -> bool:
        return shards_weights(self.training)

    def load_lm(self, folder: Path) -> Any:
        """A causal language model for actor()."""
        return load_causal_lm(folder, num_frozen_layers=0, trainable=False, **self._place())

    def actor(self, lm: Any, *, num_frozen_layers: int) -> Actor:
        """The actor of a model of load_lm, ready to compute."""
        most = max_over_shards(self.training, self.group)
        actor = Actor(lm, num_frozen_layers=num_frozen_layers, dtype=self.dtype, max_over_ranks=most)
        self._prepare(actor)
        return actor

    def load_scorer(self, folder: Path, *, microbatch_tokens: int) -> Scorer:
        """The scorer of a reward model folder; each rank scores its share of the completions."""
        scorer = load_reward_scorer(
            folder,
            microbatch_tokens=microbatch_tokens,
            max_over_ranks=max_over_shards(self.training, self.group),
            prepare=self._prepare,
            **self._place(),
        )
        return SharedScorer(scorer, partial(over_ranks, self.group))

    def release(self) -> None:
        """Free the memory of all models."""
        for module in self.loaded:
            free_frozen_model(module, self.training)
        self.loaded.clear()
        release_models()

    def _place(self) -> dict[str, Any]:
        shard = weight_shards(self.training, group=self.group, dtype=self.dtype)
        return {"dtype": self.dtype, "device": self.device, "shard": shard}

    def _prepare(self, module: torch.nn.Module) -> None:
        prepare_frozen_model(module, self.training, group=self.group, dtype=self.dtype)
        self.loaded.append(module)
