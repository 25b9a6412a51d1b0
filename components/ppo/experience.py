"""From completions to experience: log-probs, values and scores of a rollout, its rewards and its advantages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from components.ppo.ptx import DemonstrationLoss
from components.rlhf.config.ppo import GROUP_ESTIMATORS, WHITENED_ESTIMATORS, PpoConfig
from components.rlhf.data.batching import TokenBatch, collate_completions
from components.rlhf.data.microbatches import equal_passes
from components.rlhf.data.ragged import Ragged
from components.rlhf.data.records import Completion
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.advantages import equal_groups, estimate_advantages, reward_to_go, shape_valid_scores
from components.rlhf.maths.importance import rejection_mask
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.masked import whiten
from components.rlhf.maths.rewards import token_rewards
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.packing import plan_for
from components.rlhf.models.scalar import ScalarModel, at_last_token, before_actions
from components.rlhf.rewards.protocol import ComputedStates, Scorer
from components.rlhf.rewards.rewards import Rewards, weighted_sum
from components.rlhf.text.errors import NonFiniteError


@dataclass(frozen=True, kw_only=True)
class Models:
    """The four models of PPO."""

    actor: Actor  # trained, starts from the SFT model
    reference: Actor  # the SFT model, frozen
    critic: ScalarModel | None  # trained, starts from the reward model; None for estimators without a critic
    reward_model: ScalarModel | None  # frozen
    scorer: Scorer | None  # scores responses with the reward model, whatever its tokenizer
    shared_trunk: bool  # all models that compute with the actor's ids hold the same frozen layers


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What every iteration of PPO computes with."""

    models: Models
    rewards: Rewards
    config: PpoConfig
    distribution: SamplingDistribution
    group: Group = SINGLE_PROCESS
    demonstrations: DemonstrationLoss | None = None  # for the actor's steps, with ptx_coef
    engines: Mapping[str, TrainEngine] = field(default_factory=dict)  # of "actor" and, if there is one, "critic"


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One rollout batch, ready for any number of epochs. B responses, T the longest one, all rows right-padded.

    The [B, T] of floats are 0 where batch.response_mask is False: at padding, and at tokens of an environment.
    """

    batch: TokenBatch
    old_logprobs: Tensor  # [B, T] of the sampling policy, computed by the trainer or the rollout engine (old_logprobs)
    ref_logprobs: Tensor  # [B, T]
    engine_logprobs: Tensor  # [B, T] computed by the rollout engine
    old_values: Tensor | None  # [B, T]; None without a critic
    scores: (
        Tensor  # [B] weighted sum of the scores of all rewards; the reward model's are normalized if the config says so
    )
    reward_parts: Mapping[str, Tensor]  # [B] scores of each reward by name
    rewards: Tensor  # [B] scores after missing_eos_penalty and reward_clip, of which the objective is the mean
    kl: Tensor  # [B, T] log-ratio to the reference (k1), whichever estimator is penalized
    entropy: Tensor  # [B, T]; without the trainer's log-probs an unbiased estimate, -old_logprobs
    advantages: Tensor  # [B, T], whitened for the estimators that do so
    returns: Tensor  # [B, T]
    loss_mask: Tensor  # [B, T] bool: the tokens of the model that are trained on
    equal_groups: (
        Tensor | None
    )  # [P] bool: all responses to a prompt have the same reward; None unless they are compared
    kl_coef: float  # coefficient of the KL penalty, in the reward or in the loss
    truncated: Tensor  # [B] bool
    failed: Tensor  # [B] bool: the environment failed, so the response is in no loss, baseline and statistic
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
def make_experience(
    learner: Learner, completions: Sequence[Completion], *, kl_coef: float, group_size: int = 1
) -> Experience:
    """Score this rank's share of a rollout with all models and estimate its advantages.

    Each group_size neighbors are the responses to one prompt; with 1, responses are not compared. Rows go through the models in the
    same passes as in the first epoch of updates, so that the first ratio is exactly 1.
    """
    models, config = learner.models, learner.config
    # A truncated response stays as it was sampled; no EOS is appended.
    batch = collate_completions(completions)
    batch = batch.to(next(models.actor.parameters()).device)
    mask = batch.response_mask
    truncated, failed = (
        torch.tensor(flags, device=mask.device)
        for flags in ([c.truncated for c in completions], [bool(c.failure) for c in completions])
    )
    minibatches = plan_minibatches(range(len(batch)), batch, learner)
    passes = [rows for minibatch in minibatches for rows in minibatch]
    engine_logprobs = _engine_logprobs(completions, mask)
    found = _compute(learner, batch, passes, engine_logprobs)
    computed = ComputedStates(batch=batch, passes=passes, states=found.states, last_features=found.last_features)
    scores, parts = score(learner, completions, computed)
    scores = scores.to(mask.device)
    rewards, clipped = response_rewards(scores, truncated, config)

    compares = config.advantage in GROUP_ESTIMATORS and group_size > 1
    groups = equal_groups(rewards.view(-1, group_size), ~failed.view(-1, group_size)) if compares else None
    loss_mask = mask & (~failed & _trained_rows(truncated, groups, group_size, config))[:, None]
    if config.rejection is not None:
        limits = config.rejection
        loss_mask &= rejection_mask(
            found.old_logprobs, engine_logprobs, mask, limits.statistic, limits.low, limits.high
        )
    shaped = rewards
    if compares:
        shaped = shape_valid_scores(
            rewards.view(-1, group_size), ~failed.view(-1, group_size), config.advantage
        ).flatten()
    elif config.advantage == "remax":
        shaped = rewards - torch.tensor([c.baseline for c in completions], device=mask.device)
    penalty = estimate_kl(found.old_logprobs, found.ref_logprobs, mask, config.kl_estimator, config.kl_clamp)
    per_token = token_rewards(shaped, penalty, mask, kl_coef=kl_coef if config.kl_in == "reward" else 0.0)
    if found.old_values is None:
        advantages = returns = reward_to_go(per_token, mask, gamma=config.gamma)
    else:  # the returns are those of the advantages before whitening
        advantages, returns = estimate_advantages(
            found.old_values, per_token, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
        )
    if config.whiten_advantages and config.advantage in WHITENED_ESTIMATORS:
        advantages = whiten(advantages, loss_mask, reduce=learner.group.sum)
    return Experience(
        batch=batch,
        old_logprobs=found.old_logprobs,
        ref_logprobs=found.ref_logprobs,
        engine_logprobs=engine_logprobs,
        old_values=found.old_values,
        scores=scores,
        reward_parts=parts,
        rewards=rewards,
        kl=estimate_kl(found.old_logprobs, found.ref_logprobs, mask, "k1"),
        entropy=found.entropy,
        advantages=advantages,
        returns=returns,
        loss_mask=loss_mask,
        equal_groups=groups,
        kl_coef=kl_coef,
        truncated=truncated,
        failed=failed,
        clipped=clipped,
        states=found.states,
        features=found.features,
        pack_limit=models.actor.pack_limit,
        minibatches=minibatches,
    )


@torch.no_grad()
def score(
    learner: Learner, completions: Sequence[Completion], computed: ComputedStates | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores [B] of the responses, and those of each reward. Raises NonFiniteError on every rank if one is not finite."""
    parts = learner.rewards.score_parts(completions, computed)
    for name, scores in parts.items():
        _require_finite_scores(name, scores, completions, learner.group)
    return weighted_sum(parts, learner.rewards.weights), parts


def response_rewards(scores: Tensor, truncated: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """Scores [B] after the penalty for a missing EOS and the clip, and where the clip applied (bool)."""
    limit = math.inf if config.reward_clip is None else config.reward_clip
    penalized = scores - config.missing_eos_penalty * truncated
    return penalized.clamp(-limit, limit), penalized.abs() > limit


def _trained_rows(truncated: Tensor, equal: Tensor | None, group_size: int, config: PpoConfig) -> Tensor:
    """[B] bool: the responses that are trained on."""
    rows = ~truncated if config.mask_truncated else torch.ones_like(truncated)
    if config.drop_equal_groups and equal is not None:
        rows = rows & ~equal.repeat_interleave(group_size)
    return rows


@dataclass(frozen=True, kw_only=True)
class _Computed:
    """What the models compute of a rollout."""

    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    old_values: Tensor | None  # [B, T]; None without a critic
    states: Ragged | None  # as in Experience
    features: Ragged | None
    last_features: Tensor | None  # [B, H], of a reward model that shares all layers with the critic


def _compute(learner: Learner, batch: TokenBatch, passes: Sequence[Tensor], engine_logprobs: Tensor) -> _Computed:
    """The frozen layers once, then log-probs of actor and reference, and values."""
    models, critic, shape = learner.models, learner.models.critic, batch.response_mask.shape
    states = Ragged(batch.lengths) if models.shared_trunk else None
    features = Ragged(batch.response_lengths) if critic is not None and critic.trains == "head" else None
    old_logprobs, entropy, ref_logprobs, values = (torch.zeros(shape, device=engine_logprobs.device) for _ in range(4))
    last_features = []
    for rows in passes:
        part = batch.select(rows)
        width = part.response_ids.shape[1]
        part_states = models.actor.trunk(part) if models.shared_trunk else None
        if states is not None and part_states is not None:
            states.put(rows, part_states)
        if learner.config.old_logprobs == "trainer":
            old_logprobs[rows, :width], entropy[rows, :width] = models.actor(
                part, learner.distribution, part_states, with_entropy=True
            )
        ref_logprobs[rows, :width], _ = models.reference(part, learner.distribution, part_states)
        part_features = None
        if critic is not None and features is not None:
            hidden = critic.features(part, part_states)
            part_features = before_actions(part, hidden)
            features.put(rows, part_features)
            last_features.append(at_last_token(part, hidden))
        if critic is not None:
            values[rows, :width] = critic(part, part_states, part_features)
    if learner.config.old_logprobs == "engine":
        old_logprobs, entropy = engine_logprobs, -engine_logprobs
    return _Computed(
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        old_values=None if critic is None else values,
        states=states,
        features=features,
        # A critic of which only the head is trained has the layers of the reward model, unless that reads text.
        last_features=torch.cat(last_features)[torch.cat(list(passes)).argsort()] if last_features else None,
    )


def plan_minibatches(order: Sequence[int], batch: TokenBatch, learner: Learner) -> list[list[Tensor]]:
    """Cut this rank's rows, in this order, into minibatches, and each of them into forward passes.

    Every rank has equally many rows, and gets equally many passes of each minibatch. Returns row indices [b] of each pass.
    """
    config, group, models = learner.config, learner.group, learner.models
    plan = plan_for(*(m for m in (models.actor, models.reference, models.critic, models.reward_model) if m is not None))
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


def _require_finite_scores(name: str, scores: Tensor, completions: Sequence[Completion], group: Group) -> None:
    """Raise NonFiniteError on every rank if a score of any rank is nan or infinite."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if group.max_int(len(bad)) == 0:
        return
    problems = []
    if bad:
        first = completions[bad[0]]
        problems.append(
            f"The {'reward model' if name == 'reward_model' else f'reward {name}'} scored the response {first.response[:80]!r} to prompt "
            f"{first.prompt.id or first.prompt.prompt[:80]!r} as {float(scores[bad[0]])} ({len(bad)} of {len(scores)} scores are "
            "not finite)"
        )
    raise NonFiniteError(group.gather(problems)[0])
