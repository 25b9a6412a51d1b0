"""Several epochs of clipped updates of the actor and the critic on one rollout."""

from collections import defaultdict

import torch
from torch import Tensor

from components.ppo.experience import Experience, Learner
from components.rlhf.maths.importance import importance_weights
from components.rlhf.maths.losses import denominator_of, policy_loss, value_loss
from components.rlhf.maths.masked import masked_moments
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.text.errors import require_finite


def update(learner: Learner, experience: Experience, *, seed: int, iteration: int) -> dict[str, float]:
    """Train on every response num_epochs times; return means over all optimizer steps, and the largest error of the first ratio.

    The first epoch takes the rollout in its own order (prompts are already shuffled), later ones in a seeded shuffle. Raises
    NonFiniteError when a loss or a gradient norm is nan or infinite.
    """
    sums: dict[str, float] = defaultdict(float)
    steps = 0
    first_ratio_error = 0.0
    weights, importance_metrics = _importance(learner, experience)
    microbatches = experience.microbatches
    size = len(experience.batch)
    per_minibatch = len(microbatches) * (learner.config.minibatch // learner.group.world_size) // size
    for epoch in range(learner.config.num_epochs):
        order = _epoch_order(size, seed=seed, iteration=iteration, epoch=epoch).to(microbatches[0].device)
        for start in range(0, len(microbatches), per_minibatch):
            minibatch = [order[rows] for rows in microbatches[start : start + per_minibatch]]
            values = _optimizer_step(learner, experience, minibatch, weights)
            if steps == 0:
                first_ratio_error = values["ratio_error"]
            responses = torch.cat(minibatch).tolist()
            for name in ("loss/policy", "loss/value", "actor/grad_norm", "critic/grad_norm"):
                where = f"epoch {epoch}, minibatch {start // per_minibatch}, responses {responses}"
                require_finite(values[name], what=name, step=iteration, batch=where)
            steps += 1
            for name, value in values.items():
                sums[name] += value
    means = {name: value / steps for name, value in sums.items() if name != "ratio_error"}
    return means | {"actor/first_ratio_error": first_ratio_error} | importance_metrics


def _optimizer_step(
    learner: Learner, e: Experience, minibatch: list[Tensor], weights: Tensor | None
) -> dict[str, float]:
    """One step of both models on a minibatch, given as the rows of its microbatches; every rank has an equal share of it."""
    models, config, engines, group = learner.models, learner.config, learner.engines, learner.group
    all_rows = torch.cat(minibatch)
    denominator = group.sum(denominator_of(e.batch.response_mask[all_rows], config.loss_aggregation))
    num_tokens = float(group.sum(e.batch.response_mask[all_rows].sum()))
    sums: dict[str, float] = defaultdict(float)
    largest_ratio_error = 0.0
    for number, rows in enumerate(minibatch, start=1):
        batch, mask = e.batch.select(rows), e.batch.response_mask[rows]
        states = None if e.states is None else e.states[rows]
        logprobs, _ = models.actor(batch, learner.distribution, states)
        policy = policy_loss(
            logprobs,
            e.old_logprobs[rows],
            e.advantages[rows],
            mask,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            weights=None if weights is None else weights[rows],
            aggregation=config.loss_aggregation,
            denominator=denominator,
        )
        share = float(mask.sum()) / num_tokens
        router_losses = {}
        if models.actor.router_loss is not None:
            router_losses["actor"] = share * models.actor.router_loss
        engines["actor"].backward(policy.loss + router_losses.get("actor", 0.0), last=number == len(minibatch))
        new_values = models.critic(batch, states, features=None if e.features is None else e.features[rows])
        value = value_loss(
            new_values,
            e.old_values[rows],
            e.returns[rows],
            mask,
            value_clip_range=config.value_clip_range,
            aggregation=config.loss_aggregation,
            denominator=denominator,
        )
        if models.critic.router_loss is not None:
            router_losses["critic"] = share * models.critic.router_loss
        engines["critic"].backward(value + router_losses.get("critic", 0.0), last=number == len(minibatch))
        for name, loss in router_losses.items():
            sums[f"{name}/router_loss"] += loss.item()
        sums["loss/policy"] += policy.loss.item()
        sums["loss/value"] += value.item()
        sums["actor/clip_fraction"] += policy.clip_fraction.item() * share
        sums["actor/approx_kl"] += policy.approx_kl.item() * share
        ratio_error = ((logprobs.detach() - e.old_logprobs[rows]).exp() - 1).abs().max().item()
        largest_ratio_error = max(largest_ratio_error, ratio_error)
    values = dict(zip(sums, group.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True))
    values["ratio_error"] = group.max(torch.tensor(largest_ratio_error)).item()
    for name in ("actor", "critic"):
        info = engines[name].step()
        values[f"{name}/grad_norm"] = info.grad_norm
        values[f"{name}/learning_rate"] = info.learning_rate
    return values


def _importance(learner: Learner, e: Experience) -> tuple[Tensor | None, dict[str, float]]:
    """Weight [B, T] of each token, trainer against rollout engine, the same in every epoch; and its metrics. None if off."""
    if learner.config.importance_clip is None:
        return None, {}
    low, high = learner.config.importance_clip
    mask, reduce = e.batch.response_mask, learner.group.sum
    weights, outside = importance_weights(e.old_logprobs, e.engine_logprobs, mask, low=low, high=high)
    return weights, {
        "importance/mean": masked_moments(weights, mask, reduce)[0].item(),
        "importance/clipped": masked_moments(outside.float(), mask, reduce)[0].item(),
    }


def _epoch_order(size: int, *, seed: int, iteration: int, epoch: int) -> Tensor:
    """Row order of an epoch; it depends on its arguments alone, so that a resumed run repeats it."""
    if epoch == 0:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(derive_seed("epoch order", seed, iteration, epoch))
    return torch.randperm(size, generator=generator)
