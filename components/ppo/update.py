"""Several epochs of clipped updates of the actor and the critic on one rollout."""

from collections import defaultdict

import torch
from torch import Tensor

from components.ppo.experience import Experience, Models
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.importance import importance_weights
from components.rlhf.maths.losses import denominator_of, policy_loss, value_loss
from components.rlhf.maths.masked import masked_moments
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.text.errors import require_finite


def update(
    experience: Experience,
    models: Models,
    engines: dict[str, TrainEngine],
    ppo: PpoConfig,
    distribution: SamplingDistribution,
    *,
    seed: int,
    iteration: int,
    group: Group = SINGLE_PROCESS,
    checkpoint: object = None,
) -> dict[str, float]:
    """Train on every response num_epochs times; return means over all optimiser steps, and the largest first ratio's error.

    The first epoch goes through the rollout in its own order (prompts are already shuffled), later ones in a seeded shuffle.
    """
    sums: dict[str, float] = defaultdict(float)
    steps = 0
    first_ratio_error = 0.0
    weights, importance = _importance(experience, ppo, group)
    parts_of_all = experience.microbatches
    per_minibatch = len(parts_of_all) * (ppo.minibatch // group.world_size) // len(experience.batch)
    for epoch in range(ppo.num_epochs):
        order = _order(len(experience.batch), seed=seed, iteration=iteration, epoch=epoch).to(parts_of_all[0].device)
        for start in range(0, len(parts_of_all), per_minibatch):
            parts = [order[part] for part in parts_of_all[start : start + per_minibatch]]
            values = _step(experience, models, engines, ppo, distribution, weights, parts, group)
            if steps == 0:
                first_ratio_error = values["ratio_error"]
            for name in ("loss/policy", "loss/value", "actor/grad_norm", "critic/grad_norm"):
                require_finite(
                    values[name],
                    name=name,
                    step=iteration,
                    batch=f"epoch {epoch}, minibatch {start // per_minibatch}, responses {torch.cat(parts).tolist()}",
                    checkpoint=checkpoint,
                )
            steps += 1
            for name, value in values.items():
                sums[name] += value
    means = {name: value / steps for name, value in sums.items() if name != "ratio_error"}
    return means | {"actor/first_ratio_error": first_ratio_error} | importance


def _step(
    e: Experience,
    models: Models,
    engines: dict[str, TrainEngine],
    ppo: PpoConfig,
    distribution: SamplingDistribution,
    weights: Tensor | None,
    parts: list[Tensor],
    group: Group,
) -> dict[str, float]:
    """One optimiser step of both models over the microbatches of one minibatch, of which each process has an equal share."""
    rows = torch.cat(parts)
    denominator = group.sum(denominator_of(e.batch.response_mask[rows], ppo.loss_aggregation))
    tokens = float(group.sum(e.batch.response_mask[rows].sum()))
    sums: dict[str, float] = defaultdict(float)
    largest_ratio_error = 0.0
    for number, part in enumerate(parts, start=1):
        batch, mask = e.batch.select(part), e.batch.response_mask[part]
        states = None if e.states is None else e.states[part]
        logprobs, _ = models.actor(batch, distribution, states)
        policy = policy_loss(
            logprobs,
            e.old_logprobs[part],
            e.advantages[part],
            mask,
            clip_range=ppo.clip_range,
            clip_range_high=ppo.clip_range_high,
            dual_clip=ppo.dual_clip,
            weights=None if weights is None else weights[part],
            aggregation=ppo.loss_aggregation,
            denominator=denominator,
        )
        engines["actor"].backward(policy.loss, last=number == len(parts))
        new_values = models.critic(batch, states, features=None if e.features is None else e.features[part])
        value = value_loss(
            new_values,
            e.old_values[part],
            e.returns[part],
            mask,
            value_clip_range=ppo.value_clip_range,
            aggregation=ppo.loss_aggregation,
            denominator=denominator,
        )
        engines["critic"].backward(value, last=number == len(parts))
        share = float(mask.sum()) / tokens
        sums["loss/policy"] += policy.loss.item()
        sums["loss/value"] += value.item()
        sums["actor/clip_fraction"] += policy.clip_fraction.item() * share
        sums["actor/approx_kl"] += policy.approx_kl.item() * share
        ratio_error = ((logprobs.detach() - e.old_logprobs[part]).exp() - 1).abs().max().item()
        largest_ratio_error = max(largest_ratio_error, ratio_error)
    values = dict(zip(sums, group.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True))
    values["ratio_error"] = group.max(torch.tensor(largest_ratio_error)).item()
    for name in ("actor", "critic"):
        info = engines[name].step()
        values[f"{name}/grad_norm"] = info.grad_norm
        values[f"{name}/learning_rate"] = info.learning_rate
    return values


def _importance(e: Experience, ppo: PpoConfig, group: Group) -> tuple[Tensor | None, dict[str, float]]:
    """Weight of each token against the rollout engine [B, T], the same in every epoch, and its metrics; nothing if off."""
    if ppo.importance_clip is None:
        return None, {}
    low, high = ppo.importance_clip
    mask = e.batch.response_mask
    weights, outside = importance_weights(e.old_logprobs, e.engine_logprobs, mask, low=low, high=high)
    return weights, {
        "importance/mean": masked_moments(weights, mask, group.sum)[0].item(),
        "importance/clipped": masked_moments(outside.float(), mask, group.sum)[0].item(),
    }


def _order(size: int, *, seed: int, iteration: int, epoch: int) -> Tensor:
    """Row order of an epoch, from its seed alone: a resumed run goes through the same one."""
    if epoch == 0:
        return torch.arange(size)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + epoch)
    return torch.randperm(size, generator=generator)
