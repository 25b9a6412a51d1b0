"""From completions to experience: what the four models say of a rollout, and the advantages that follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.rlhf.config.ppo import PpoConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.data.records import Completion
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.maths.advantages import estimate_advantages
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.masked import whiten
from components.rlhf.maths.rewards import token_rewards
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Models:
    """The four models of PPO."""

    actor: Actor  # trained, started from the fine-tuned model
    reference: Actor  # the fine-tuned model, frozen
    critic: ScalarModel  # trained, started from the reward model
    reward_model: ScalarModel  # frozen
    shared_trunk: bool  # the frozen layers are the same modules in all four


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout batch, ready for any number of epochs. B responses, T the longest one, all rows right-padded."""

    batch: TokenBatch
    old_logprobs: Tensor  # [B, T] of the actor that sampled, by the training engine
    ref_logprobs: Tensor  # [B, T]
    engine_logprobs: Tensor  # [B, T] of the rollout engine itself
    old_values: Tensor  # [B, T]
    scores: Tensor  # [B] as the reward model gave them, normalised if settings say so
    kl: Tensor  # [B, T] log-ratio to the reference (k1), whatever estimator is penalised
    entropy: Tensor  # [B, T]
    advantages: Tensor  # [B, T], whitened
    returns: Tensor  # [B, T]
    truncated: Tensor  # [B] bool
    states: Tensor | None  # [B, S, H] above the frozen layers, computed once for all models and epochs
    features: Tensor | None  # [B, S, H] of the reward model, where only the critic's head is trained
    microbatches: list[Tensor]  # rows [b] of each forward pass, in the order of the minibatches


@torch.no_grad()
def make_experience(
    models: Models,
    completions: Sequence[Completion],
    ppo: PpoConfig,
    distribution: SamplingDistribution,
    *,
    kl_coef: float,
    group: Group = SINGLE_PROCESS,
) -> Experience:
    """Score a rollout (this process's share of it) with all four models and estimate its advantages.

    Rows go through the models in microbatches of the same shape as in the first epoch of updates, so that the first ratio is
    exactly 1.
    """
    # 1. One batch of known lengths; nothing is overwritten or appended, a truncated response stays as it was sampled.
    batch = collate([c.prompt_ids for c in completions], [c.response_ids for c in completions])
    batch = batch.to(next(models.actor.parameters()).device)
    mask = batch.response_mask
    truncated = torch.tensor([c.truncated for c in completions], device=mask.device)
    # The widest row of all processes, so that all of them run the same number of passes.
    width = group.max_int(batch.input_ids.shape[1])
    rows = microbatches(
        len(batch), minibatch=ppo.minibatch // group.world_size, max_rows=ppo.training.microbatch_tokens // width
    )
    rows = [part.to(mask.device) for part in rows]

    # 2. The frozen layers, once.
    states = map_microbatches(rows, lambda r: models.actor.trunk(batch.select(r))) if models.shared_trunk else None

    # 3. Log-probs of actor and reference, values, scores.
    def states_at(r: Tensor) -> Tensor | None:
        return None if states is None else states[r]

    old_logprobs, entropy = _map_microbatches_pair(
        rows, lambda r: models.actor(batch.select(r), distribution, states_at(r), with_entropy=True)
    )
    ref_logprobs, _ = _map_microbatches_pair(
        rows, lambda r: models.reference(batch.select(r), distribution, states_at(r))
    )
    features = map_microbatches(rows, lambda r: models.reward_model.features(batch.select(r), states_at(r)))
    scores = models.reward_model.apply_head(features[torch.arange(len(batch)), batch.last_positions()])
    keep_features = models.critic.trains == "head"
    old_values = map_microbatches(
        rows, lambda r: models.critic(batch.select(r), states_at(r), features=features[r] if keep_features else None)
    )
    _require_finite_scores(scores, completions)

    # 4. Rewards: the score is penalised and clipped first, then the KL penalty of every token is added.
    shaped = scores - ppo.missing_eos_penalty * truncated
    penalty = estimate_kl(old_logprobs, ref_logprobs, mask, ppo.kl_estimator)
    clip = None if ppo.reward_clip is None else (-ppo.reward_clip, ppo.reward_clip)
    rewards = token_rewards(shaped, penalty, mask, kl_coef=kl_coef, reward_clip=clip)

    # 5. Advantages; the returns are those of the advantages before whitening.
    advantages, returns = estimate_advantages(old_values, rewards, mask, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, reduce=group.sum)
    return Experience(
        batch=batch,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        engine_logprobs=_engine_logprobs(completions, mask),
        old_values=old_values,
        scores=scores,
        kl=estimate_kl(old_logprobs, ref_logprobs, mask, "k1"),
        entropy=entropy,
        advantages=advantages,
        returns=returns,
        truncated=truncated,
        states=states,
        features=features if keep_features else None,
        microbatches=rows,
    )


def microbatches(num_rows: int, *, minibatch: int, max_rows: int) -> list[Tensor]:
    """Row indices of each forward pass: whole minibatches, or equal parts of them with at most `most` rows."""
    return [
        part
        for rows in torch.arange(num_rows).split(minibatch)
        for part in rows.split(max(min(minibatch, max_rows), 1))
    ]


def map_microbatches(rows: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute over each group of rows, one after the other, as one tensor."""
    return torch.cat([compute(group) for group in rows])


def _map_microbatches_pair(
    rows: Sequence[Tensor], compute: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    first, second = zip(*(compute(group) for group in rows), strict=True)
    return torch.cat(first), torch.cat(second)


def _engine_logprobs(completions: Sequence[Completion], mask: Tensor) -> Tensor:
    padded = torch.zeros(mask.shape)
    for row, completion in enumerate(completions):
        if completion.logprobs is not None:
            padded[row, : len(completion.logprobs)] = completion.logprobs
    return padded.to(mask.device)


def _require_finite_scores(scores: Tensor, completions: Sequence[Completion]) -> None:
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = completions[bad[0]]
        raise InputError(
            f"The reward model gave {float(scores[bad[0]])} to the response {first.response[:80]!r} to prompt "
            f"{first.prompt.id or first.prompt.prompt[:80]!r} ({len(bad)} of {len(scores)} are not finite); train it again."
        )
