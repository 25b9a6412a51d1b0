"""A scorer over several processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.rlhf.data.records import Completion
from components.rlhf.rewards.protocol import ComputedStates, Scorer

Work = Callable[[list[Completion]], list[float]]


class SharedScorer:
    """Each process scores its share of the completions, and all get every score. Implements Scorer."""

    def __init__(self, scorer: Scorer, over_ranks: Callable[[Sequence[Completion], Work], list[float]]) -> None:
        """over_ranks(items, work) is work(items), of which each process does a share."""
        self.scorer = scorer
        self.over_ranks = over_ranks

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        # Computed for all completions, of which this process scores its share alone.
        return torch.tensor(self.over_ranks(completions, lambda own: self.scorer.score(own).tolist()))
