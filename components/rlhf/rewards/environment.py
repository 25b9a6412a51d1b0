"""The environment's own reward of a response of several turns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.rlhf.data.records import Completion
from components.rlhf.rewards.owner import Owner, named
from components.rlhf.rewards.protocol import ComputedStates


class EnvironmentScorer:
    """The sum of the rewards that the environment gave in all turns. Implements Scorer."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises InputError for a response that no environment has seen."""
        rewards = [completion.environment_reward for completion in completions]
        found = [reward for reward in rewards if reward is not None]
        if len(found) < len(rewards):
            first = completions[rewards.index(None)]
            raise self.owner.error(f"needs an environment, and the response to prompt {named(first.prompt)} has none")
        return torch.tensor(found, dtype=torch.float32)
