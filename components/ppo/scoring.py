"""The rewards of PPO as one score."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from components.rlhf.data.records import Completion
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.rewards.rewards import Rewards, weighted_sum


@dataclass(frozen=True)
class WeightedScorer:
    """The weighted sum of all rewards. Implements Scorer."""

    rewards: Rewards

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        return weighted_sum(self.rewards.score_parts(completions, computed), self.rewards.weights)
