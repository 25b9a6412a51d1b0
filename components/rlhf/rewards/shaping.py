"""Rewards of the form of a response: its length, and how much it repeats itself. Both count tokens of the model, in any script."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.rlhf.data.records import Completion
from components.rlhf.rewards.protocol import ComputedStates


class LengthScorer:
    """0 for good lengths, falling linearly to -1 outside. Implements Scorer."""

    def __init__(self, *, min_tokens: int, max_tokens: int, buffer: int) -> None:
        self.min_tokens, self.max_tokens, self.buffer = min_tokens, max_tokens, buffer

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        lengths = torch.tensor([c.num_model_tokens for c in completions], dtype=torch.float32)
        return length_penalty(lengths, min_tokens=self.min_tokens, max_tokens=self.max_tokens, buffer=self.buffer)


class RepetitionScorer:
    """Minus the fraction of repeated n-grams. Implements Scorer."""

    def __init__(self, *, ngram: int) -> None:
        self.ngram = ngram

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        return torch.tensor([-repeated_fraction(c.model_runs, self.ngram) for c in completions], dtype=torch.float32)


def length_penalty(lengths: Tensor, *, min_tokens: int, max_tokens: int, buffer: int) -> Tensor:
    """Penalties [B] from 0 to -1 of lengths [B] in tokens, with the token that ends the response.

    -min(d / buffer, 1), where d is the distance from the lengths between min_tokens and max_tokens - buffer. With min_tokens 0 it is the
    soft overlong punishment of DAPO (Yu et al. 2025, equation 13).
    """
    distance = torch.maximum(lengths - (max_tokens - buffer), min_tokens - lengths).clamp(min=0)
    return -(distance / buffer).clamp(max=1)


def repeated_fraction(runs: Sequence[Sequence[int]], ngram: int) -> float:
    """1 - (number of different n-grams / number of n-grams), the complement of distinct-n (Li et al. 2016); 0 without an n-gram.

    An n-gram lies within one run of ids: what a model says in several turns is not adjacent.
    """
    ngrams = [tuple(ids[i : i + ngram]) for ids in runs for i in range(len(ids) - ngram + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
