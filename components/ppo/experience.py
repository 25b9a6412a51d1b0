"""From completions to experience: log-probs, values and scores of a rollout, and its advantages."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.rlhf.config.ppo import PpoConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.data.records import Completion
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.advantages import estimate_advantages
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.masked import whiten
from components.rlhf.maths.rewards import token_rewards
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.rewards.protocol import ComputedStates, Scorer
from components.rlhf.text.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Models:
    """The four models of PPO."""

    actor: Actor  # trained, starts from the SFT model
    reference: Actor  # the SFT model, frozen
    critic: ScalarModel  # trained, starts from the reward model
    reward_model: ScalarModel  # frozen
    scorer: Scorer  # scores responses with the reward model, whatever its tokenizer
    shared_trunk: bool  # all models that compute with the actor's ids hold the same frozen layers


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What every iteration of PPO computes with."""

    models: Models
    config: PpoConfig
    distribution: SamplingDistribution
    group: Group = SINGLE_PROCESS
    engines: Mapping[str, TrainEngine] = field(default_factory=dict)  # of "actor" and "critic", for updates


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout batch, ready for any number of epochs. B responses, T the longest one, all rows right-padded."""

    batch: TokenBatch
    old_logprobs: Tensor  # [B, T] of the sampling policy, computed by the training engine
    ref_logprobs: Tensor  # [B, T]
    engine_logprobs: Tensor  # [B, T] computed by the rollout engine
    old_values: Tensor  # [B, T]
    scores: Tensor  # [B] reward-model scores, normalized if the config says so
    kl: Tensor  # [B, T] log-ratio to the reference (k1), whichever estimator is penalized
    entropy: Tensor  # [B, T]
    advantages: Tensor  # [B, T], whitened
    returns: Tensor  # [B, T]
    truncated: Tensor  # [B] bool
    clipped: Tensor  # [B] bool, score beyond reward_clip
    states: Tensor | None  # [B, S, H] above the frozen layers, computed once for all models and epochs
    features: Tensor | None  # [B, S, H] of the critic, if only its head is trained
    microbatches: list[Tensor]  # row indices [b] of each forward pass, in the order of the minibatches


@torch.no_grad()
def make_experience(learner: Learner, completions: Sequence[Completion], *, kl_coef: float) -> Experience:
    """Score this rank's share of a rollout with all four models and estimate its advantages.

    Rows go through the models in the same microbatches as in the first epoch of updates, so that the first ratio is exactly 1.
    """
    models, config, group = learner.models, learner.config, learner.group
    # 1. One batch of known lengths. A truncated response stays as it was sampled; no EOS is appended.
    batch = collate([c.prompt_ids for c in completions], [c.response_ids for c in completions])
    batch = batch.to(next(models.actor.parameters()).device)
    mask = batch.response_mask
    truncated = torch.tensor([c.truncated for c in completions], device=mask.device)
    # The widest row of all ranks, so that all of them run the same number of forward passes.
    width = group.max_int(batch.input_ids.shape[1])
    parts = microbatches(
        len(batch), minibatch=config.minibatch // group.world_size, max_rows=config.training.microbatch_tokens // width
    )
    parts = [rows.to(mask.device) for rows in parts]

    # 2. The frozen layers, once.
    states = (
        map_microbatches(parts, lambda rows: models.actor.trunk(batch.select(rows))) if models.shared_trunk else None
    )

    # 3. Log-probs of actor and reference, values, scores.
    def states_at(rows: Tensor) -> Tensor | None:
        return None if states is None else states[rows]

    old_logprobs, entropy = _map_microbatches_pair(
        parts,
        lambda rows: models.actor(batch.select(rows), learner.distribution, states_at(rows), with_entropy=True),
    )
    ref_logprobs, _ = _map_microbatches_pair(
        parts, lambda rows: models.reference(batch.select(rows), learner.distribution, states_at(rows))
    )
    # A critic of which only the head is trained has the layers of the reward model, or, if that reads text, frozen ones of its own.
    features = (
        map_microbatches(parts, lambda rows: models.critic.features(batch.select(rows), states_at(rows)))
        if models.critic.trains == "head"
        else None
    )
    computed = ComputedStates(batch=batch, microbatches=parts, states=states, features=features)
    scores = models.scorer.score(completions, computed).to(mask.device)
    old_values = map_microbatches(
        parts,
        lambda rows: models.critic(
            batch.select(rows), states_at(rows), features=None if features is None else features[rows]
        ),
    )
    _require_finite_scores(scores, completions)

    # 4. Rewards: the score is reduced and clipped first, then the KL penalty of every token is added.
    penalized = scores - config.missing_eos_penalty * truncated
    kl_penalty = estimate_kl(old_logprobs, ref_logprobs, mask, config.kl_estimator)
    clip = None if config.reward_clip is None else (-config.reward_clip, config.reward_clip)
    clipped = penalized.abs() > (config.reward_clip or math.inf)
    rewards = token_rewards(penalized, kl_penalty, mask, kl_coef=kl_coef, reward_clip=clip)

    # 5. Advantages; the returns are those of the advantages before whitening.
    advantages, returns = estimate_advantages(
        old_values, rewards, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    if config.whiten_advantages:
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
        clipped=clipped,
        states=states,
        features=features,
        microbatches=parts,
    )


def microbatches(num_rows: int, *, minibatch: int, max_rows: int) -> list[Tensor]:
    """Row indices of each forward pass: whole minibatches, or equal parts of them with at most max_rows rows."""
    return [
        part
        for rows in torch.arange(num_rows).split(minibatch)
        for part in rows.split(max(min(minibatch, max_rows), 1))
    ]


def map_microbatches(parts: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(rows) of each microbatch in turn, concatenated."""
    return torch.cat([compute(rows) for rows in parts])


def _map_microbatches_pair(
    parts: Sequence[Tensor], compute: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    first, second = zip(*(compute(rows) for rows in parts), strict=True)
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
            f"The reward model scored the response {first.response[:80]!r} to prompt "
            f"{first.prompt.id or first.prompt.prompt[:80]!r} as {float(scores[bad[0]])} ({len(bad)} of {len(scores)} scores are "
            "not finite); train the reward model again."
        )
