"""From completions to experience: log-probs, values and scores of a rollout, and its advantages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.rlhf.config.ppo import PpoConfig
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.data.microbatches import equal_passes
from components.rlhf.data.ragged import Ragged
from components.rlhf.data.records import Completion
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.advantages import estimate_advantages
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.masked import whiten
from components.rlhf.maths.rewards import token_rewards
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.packing import plan_for
from components.rlhf.models.scalar import ScalarModel, at_last_token, before_actions
from components.rlhf.rewards.protocol import ComputedStates, Scorer
from components.rlhf.text.errors import NonFiniteError


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
    old_logprobs: Tensor  # [B, T] of the sampling policy, computed by the trainer or the rollout engine (old_logprobs)
    ref_logprobs: Tensor  # [B, T]
    engine_logprobs: Tensor  # [B, T] computed by the rollout engine
    old_values: Tensor  # [B, T]
    scores: Tensor  # [B] reward-model scores, normalized if the config says so
    rewards: Tensor  # [B] scores after missing_eos_penalty and reward_clip, of which the objective is the mean
    kl: Tensor  # [B, T] log-ratio to the reference (k1), whichever estimator is penalized
    entropy: Tensor  # [B, T]; without the trainer's log-probs an unbiased estimate, -old_logprobs
    advantages: Tensor  # [B, T], whitened
    returns: Tensor  # [B, T]
    truncated: Tensor  # [B] bool
    clipped: Tensor  # [B] bool, score beyond reward_clip
    states: Ragged | None  # [S, H] of each row above the frozen layers, computed once for all models and epochs
    features: Ragged | None  # [T, H] of each row before each action, of a critic of which only the head is trained
    pack_limit: int  # tokens of the longest row that is packed, so that no padding is computed
    minibatches: list[list[Tensor]]  # of the first epoch: row indices [b] of each forward pass of each minibatch

    @property
    def passes(self) -> list[Tensor]:
        """Row indices [b] of every forward pass of scoring and of the first epoch."""
        return [rows for minibatch in self.minibatches for rows in minibatch]


@torch.no_grad()
def make_experience(learner: Learner, completions: Sequence[Completion], *, kl_coef: float) -> Experience:
    """Score this rank's share of a rollout with all four models and estimate its advantages.

    Rows go through the models in the same passes as in the first epoch of updates, so that the first ratio is exactly 1.
    """
    models, config, group = learner.models, learner.config, learner.group
    # 1. One batch of known lengths. A truncated response stays as it was sampled; no EOS is appended.
    batch = collate([c.prompt_ids for c in completions], [c.response_ids for c in completions])
    batch = batch.to(next(models.actor.parameters()).device)
    mask = batch.response_mask
    truncated = torch.tensor([c.truncated for c in completions], device=mask.device)
    engine_logprobs = _engine_logprobs(completions, mask)
    minibatches = plan_minibatches(range(len(batch)), batch, learner)
    passes = [rows for minibatch in minibatches for rows in minibatch]

    # 2. The frozen layers once, then log-probs of actor and reference, and values.
    states = Ragged(batch.lengths) if models.shared_trunk else None
    features = Ragged(batch.response_lengths) if models.critic.trains == "head" else None
    old_logprobs, entropy, ref_logprobs, old_values = (torch.zeros(mask.shape, device=mask.device) for _ in range(4))
    last_features = []
    for rows in passes:
        part = batch.select(rows)
        width = part.response_ids.shape[1]
        part_states = models.actor.trunk(part) if models.shared_trunk else None
        if states is not None and part_states is not None:
            states.put(rows, part_states)
        if config.old_logprobs == "trainer":
            old_logprobs[rows, :width], entropy[rows, :width] = models.actor(
                part, learner.distribution, part_states, with_entropy=True
            )
        ref_logprobs[rows, :width], _ = models.reference(part, learner.distribution, part_states)
        part_features = None
        if features is not None:
            hidden = models.critic.features(part, part_states)
            part_features = before_actions(part, hidden)
            features.put(rows, part_features)
            last_features.append(at_last_token(part, hidden))
        old_values[rows, :width] = models.critic(part, part_states, part_features)
    if config.old_logprobs == "engine":
        old_logprobs, entropy = engine_logprobs, -engine_logprobs

    # 3. Scores. A critic of which only the head is trained has the layers of the reward model, unless that reads text.
    computed = ComputedStates(
        batch=batch,
        passes=passes,
        states=states,
        last_features=torch.cat(last_features)[torch.cat(passes).argsort()] if last_features else None,
    )
    scores = models.scorer.score(completions, computed).to(mask.device)
    _require_finite_scores(scores, completions, group)

    # 4. Rewards: the score is reduced and clipped first, then the KL penalty of every token is added.
    penalized = scores - config.missing_eos_penalty * truncated
    kl_penalty = estimate_kl(old_logprobs, ref_logprobs, mask, config.kl_estimator)
    limit = math.inf if config.reward_clip is None else config.reward_clip
    clipped, response_rewards = penalized.abs() > limit, penalized.clamp(-limit, limit)
    rewards = token_rewards(response_rewards, kl_penalty, mask, kl_coef=kl_coef)

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
        engine_logprobs=engine_logprobs,
        old_values=old_values,
        scores=scores,
        rewards=response_rewards,
        kl=estimate_kl(old_logprobs, ref_logprobs, mask, "k1"),
        entropy=entropy,
        advantages=advantages,
        returns=returns,
        truncated=truncated,
        clipped=clipped,
        states=states,
        features=features,
        pack_limit=models.actor.pack_limit,
        minibatches=minibatches,
    )


def plan_minibatches(order: Sequence[int], batch: TokenBatch, learner: Learner) -> list[list[Tensor]]:
    """Cut this rank's rows, in this order, into minibatches, and each of them into forward passes.

    Every rank has equally many rows, and gets equally many passes of each minibatch. Returns row indices [b] of each pass.
    """
    config, group, models = learner.config, learner.group, learner.models
    plan = plan_for(models.actor, models.reference, models.critic, models.reward_model)
    lengths, share = batch.lengths.tolist(), config.minibatch // group.world_size
    minibatches = []
    for start in range(0, len(order), share):
        rows = order[start : start + share]
        passes = equal_passes([lengths[row] for row in rows], config.training.microbatch_tokens, group.max_int, plan)
        minibatches.append(
            [torch.tensor([rows[index] for index in indices], device=batch.lengths.device) for indices, _ in passes]
        )
    return minibatches


def _engine_logprobs(completions: Sequence[Completion], mask: Tensor) -> Tensor:
    padded = torch.zeros(mask.shape)
    for row, completion in enumerate(completions):
        if completion.logprobs is not None:
            padded[row, : len(completion.logprobs)] = completion.logprobs
    return padded.to(mask.device)


def _require_finite_scores(scores: Tensor, completions: Sequence[Completion], group: Group) -> None:
    """Raise NonFiniteError on every rank if a score of any rank is nan or infinite."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if group.max_int(len(bad)) == 0:
        return
    problems = []
    if bad:
        first = completions[bad[0]]
        problems.append(
            f"The reward model scored the response {first.response[:80]!r} to prompt "
            f"{first.prompt.id or first.prompt.prompt[:80]!r} as {float(scores[bad[0]])} ({len(bad)} of {len(scores)} scores are "
            "not finite)"
        )
    raise NonFiniteError(group.gather(problems)[0])
