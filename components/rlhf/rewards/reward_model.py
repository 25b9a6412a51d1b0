"""The reward model as a scorer, for PPO, evaluation and held-out accuracy alike."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.data.batching import collate
from components.rlhf.data.microbatches import equal_passes
from components.rlhf.data.records import Completion, PreferencePair, Prompt, is_chat
from components.rlhf.data.tokenizer import decode_response, encode_text, load_tokenizer
from components.rlhf.models.loading import is_scored_as_text, load_scalar_lm, reward_normalization
from components.rlhf.models.packing import plan_for
from components.rlhf.models.placing import Shard
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.protocol import ComputedStates, Scorer, compare_scores
from components.rlhf.rewards.text import TextScorer


class RewardModelScorer:
    """Normalized scores of responses, computed at the last token. Implements Scorer."""

    def __init__(
        self, model: ScalarModel, *, microbatch_tokens: int, max_over_ranks: Callable[[int], int] = int
    ) -> None:
        """max_over_ranks(n) is the largest n of the ranks that shard the model (ZeRO-3), which run equally many passes."""
        self.model = model
        self.microbatch_tokens = microbatch_tokens
        self.max_over_ranks = max_over_ranks

    @torch.no_grad()
    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        if computed is not None:
            return self._score_computed(computed)
        device = self.model.lm.device
        scores = torch.zeros(len(completions))
        lengths = [len(c.prompt_ids) + len(c.response_ids) for c in completions]
        plan = plan_for(self.model)
        for group, _ in equal_passes(lengths, self.microbatch_tokens, self.max_over_ranks, plan):
            rows = [completions[index] for index in group]
            batch = collate([c.prompt_ids for c in rows], [c.response_ids for c in rows])
            scores[group] = self.model.scores(batch.to(device)).cpu()
        return scores

    def _score_computed(self, computed: ComputedStates) -> Tensor:
        """Scores in the caller's passes, from its features or else from its states after the frozen layers."""
        if computed.last_features is not None:
            return self.model.apply_head(computed.last_features)
        scores = torch.zeros(len(computed.batch), device=computed.batch.input_ids.device)
        for rows in computed.passes:
            states = None if computed.states is None else computed.states.select(rows)
            scores[rows] = self.model.scores(computed.batch.select(rows), states)
        return scores


def load_reward_scorer(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    microbatch_tokens: int,
    shard: Shard | None = None,
    prepare: Callable[[ScalarModel], None] = lambda model: None,
    max_over_ranks: Callable[[int], int] = int,
) -> Scorer:
    """The scorer of a reward model folder, which computes with the ids of a response or with its text, as the folder says.

    With a shard the weights are sharded over ranks while they are read, and prepare(model) makes it compute with them.
    """
    mean, std = reward_normalization(directory)
    lm = load_scalar_lm(directory, num_frozen_layers=0, dtype=dtype, trainable=False, device=device, shard=shard)
    model = ScalarModel(lm, num_frozen_layers=0, dtype=dtype, mean=mean, std=std)
    prepare(model)
    scorer = RewardModelScorer(model, microbatch_tokens=microbatch_tokens, max_over_ranks=max_over_ranks)
    return TextScorer(scorer, load_tokenizer(directory)) if is_scored_as_text(directory) else scorer


def as_completion(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, text: str, *, max_tokens: int, complete: bool = True
) -> Completion:
    """A human-written response of a pair as a Completion. With complete False it has no end token."""
    encoded = encode_text(tokenizer, pair.prompt, text, max_tokens=max_tokens, is_chat=is_chat(pair))
    truncated = encoded.truncated or not complete
    response_ids = encoded.response_ids if complete or encoded.truncated else encoded.response_ids[:-1]
    return Completion(
        prompt=Prompt(prompt=pair.prompt, conversation=pair.conversation),
        prompt_ids=encoded.prompt_ids,
        response_ids=response_ids,
        response=decode_response(tokenizer, encoded.prompt_ids, response_ids),
        logprobs=None,
        truncated=truncated,
    )


def pair_scores(
    scorer: Scorer,
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    complete: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected texts: [N] each."""
    chosen, rejected = (
        scorer.score([as_completion(tokenizer, p, text, max_tokens=max_tokens, complete=complete) for p, text in texts])
        for texts in ([(p, p.chosen) for p in pairs], [(p, p.rejected) for p in pairs])
    )
    return chosen, rejected


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Fraction of pairs whose chosen text scores higher; ties are halves."""
    return float(compare_scores(chosen, rejected).wins.mean())
