"""The interfaces of everything that judges responses: scorers give a number to each, pairwise judges prefer one of two."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from components.rlhf.data.batching import TokenBatch
from components.rlhf.data.ragged import Ragged
from components.rlhf.data.records import Completion


@dataclass(frozen=True, kw_only=True)
class ComputedStates:
    """What a caller has computed of completions, for a scorer that shares these layers with the caller's models."""

    batch: TokenBatch  # the completions, in their order
    passes: Sequence[Tensor]  # row indices [b] of each forward pass
    states: Ragged | None = None  # [S, H] of each row, after the frozen layers
    last_features: Tensor | None = None  # [B, H], final hidden state of the last token of each row


class Scorer(Protocol):
    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Scores [B] fp32, higher is better. The score of a completion does not depend on the others.

        computed saves the scorer work; a scorer that shares no layers with the caller ignores it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """The verdicts of one judge on B pairs of responses."""

    wins: Tensor  # [B] fp32: 1 if the first response is better, 0 if the second, 0.5 for a tie, nan without an answer
    consistent: (
        Tensor  # [B] bool: the judge prefers the same response in both orders; True for scores, which have no order
    )
    counts: dict[str, float] = field(default_factory=dict)  # what the answers took, such as requests and tokens

    @property
    def num_unanswered(self) -> int:
        return int(self.wins.isnan().sum())


class PairwiseJudge(Protocol):
    def compare(self, first: Sequence[Completion], second: Sequence[Completion]) -> Preferences:
        """Compare two responses to each prompt."""
        ...


class ScoreJudge:
    """Prefers the response with the higher score. Implements PairwiseJudge."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def compare(self, first: Sequence[Completion], second: Sequence[Completion]) -> Preferences:
        scores = self.scorer.score([*first, *second])
        return compare_scores(scores[: len(first)], scores[len(first) :])


def compare_scores(first: Tensor, second: Tensor) -> Preferences:
    """Preferences by two scores [B] for each prompt; equal scores are a tie."""
    wins = torch.where(first == second, 0.5, (first > second).float())
    return Preferences(wins=wins, consistent=torch.ones(len(wins), dtype=torch.bool))
