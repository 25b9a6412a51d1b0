"""The distribution of a sampling config, and its controls in the engine hf."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from components.rlhf.config.model import SamplingConfig
from components.rlhf.models.actor import SamplingDistribution


def sampling_distribution(sampling: SamplingConfig, stop_ids: tuple[int, ...]) -> SamplingDistribution:
    """The distribution of which the trainer computes log-probs: that of the rollout engines."""
    return SamplingDistribution(
        temperature=sampling.temperature,
        min_new_tokens=sampling.min_new_tokens,
        stop_ids=stop_ids,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )


class Controls:
    """The controls of a batch that the engine hf decodes. Without any they do nothing."""

    def __init__(self, sampling: SamplingConfig, prompt_ids: Sequence[Sequence[int]]) -> None:
        # That of logits which are divided by the temperature already.
        self._distribution = replace(sampling_distribution(sampling, ()), temperature=1.0)
        self._prompt_ids = prompt_ids
        self._seen: Tensor | None = None  # [B, V] bool: tokens of prompt and response

    def penalize(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits [b, V] of these rows [b] of the batch after the repetition penalty."""
        if self._distribution.repetition_penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(len(self._prompt_ids), logits.shape[-1], dtype=torch.bool)
            for row, ids in enumerate(self._prompt_ids):
                self._seen[row, list(ids)] = True
            self._seen = self._seen.to(logits.device)
        return self._distribution.penalize(logits, self._seen[rows])

    def truncate(self, logits: Tensor) -> Tensor:
        """Logits [b, V], divided by the temperature, with -inf in place at the tokens that are not kept."""
        if not self._distribution.truncates:
            return logits
        return logits.masked_fill_(~self._distribution.kept(logits), float("-inf"))

    def observe(self, tokens: Tensor, rows: Tensor) -> None:
        """The tokens [b] were sampled in these rows [b]."""
        if self._seen is not None:
            self._seen[rows, tokens] = True
