"""Several epochs of clipped updates of the actor and, if there is one, the critic on one rollout."""

from collections import defaultdict

import torch
from torch import Tensor

from components.ppo.experience import Experience, Learner, plan_minibatches
from components.rlhf.config.ppo import PpoConfig
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.importance import importance_weights
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.losses import aggregate, denominator_of, policy_loss, value_loss
from components.rlhf.maths.masked import masked_moments
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.text.errors import require_finite


def update(learner: Learner, experience: Experience, *, seed: int, iteration: int) -> dict[str, float]:
    """Train on every response num_epochs times; return means over all optimizer steps, and the largest error of the first ratio.

    The first epoch takes the rollout in its own order (prompts are already shuffled), later ones in a seeded shuffle. In the first
    critic.warmup_iterations only the critic is trained. Raises NonFiniteError when a loss or a gradient norm is nan or infinite.
    """
    sums: dict[str, float] = defaultdict(float)
    steps = 0
    first_ratio_error = 0.0
    weights, importance_metrics = _importance(learner, experience)
    trains_actor = iteration > learner.config.critic.warmup_iterations
    for epoch in range(learner.config.num_epochs):
        minibatches = experience.minibatches
        if epoch > 0:
            order = _epoch_order(len(experience.batch), seed=seed, iteration=iteration, epoch=epoch)
            minibatches = plan_minibatches(order, experience.batch, learner)
        for number, passes in enumerate(minibatches):
            step = (iteration - 1) * learner.config.num_epochs * len(minibatches) + epoch * len(minibatches) + number
            values = _optimizer_step(learner, experience, passes, weights, step, trains_actor=trains_actor)
            if steps == 0:
                first_ratio_error = values.get("ratio_error", 0.0)
            where = f"epoch {epoch}, minibatch {number}, responses {sorted(torch.cat(passes).tolist())}"
            for name in ("loss/policy", "loss/value", "actor/grad_norm", "critic/grad_norm"):
                require_finite(values.get(name, 0.0), what=name, step=iteration, batch=where)
            steps += 1
            for name, value in values.items():
                sums[name] += value
    means = {name: value / steps for name, value in sums.items() if name != "ratio_error"}
    return means | {"actor/first_ratio_error": first_ratio_error} | importance_metrics


def _optimizer_step(
    learner: Learner, e: Experience, passes: list[Tensor], weights: Tensor | None, step: int, *, trains_actor: bool
) -> dict[str, float]:
    """One step of each model on a minibatch, given as the rows of its passes; every rank has an equal share of it.

    step counts the steps of the whole run from 0.

    The actor takes its step before the critic begins, so that only one of them holds gradients at a time.
    """
    rows, values = torch.cat(passes), {}
    # At least 1: all responses of a minibatch may be left out of the losses.
    denominator = learner.group.sum(_denominator(e.loss_mask[rows], learner.config)).clamp(min=1)
    num_tokens = learner.group.sum(e.loss_mask[rows].sum()).clamp(min=1)
    if trains_actor:
        values |= _actor_step(learner, e, passes, weights, step, denominator, num_tokens)
    if learner.models.critic is not None:
        values |= _critic_step(learner, e, passes, denominator, num_tokens)
    return values


def _denominator(mask: Tensor, config: PpoConfig) -> Tensor:
    if config.loss_aggregation == "sequence-sum-norm":
        return denominator_of(mask, "sequence-sum") * config.rollout.sampling.max_new_tokens
    return denominator_of(mask, config.loss_aggregation)


def _actor_step(
    learner: Learner,
    e: Experience,
    passes: list[Tensor],
    weights: Tensor | None,
    step: int,
    denominator: Tensor,
    num_tokens: Tensor,
) -> dict[str, float]:
    actor, config, engine = learner.models.actor, learner.config, learner.engines["actor"]
    demonstrations = learner.demonstrations
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    ratio_errors = []
    for number, rows in enumerate(passes, start=1):
        batch = e.batch.select(rows)
        width = batch.response_ids.shape[1]
        mask, old_logprobs = e.loss_mask[rows, :width], e.old_logprobs[rows, :width]
        logprobs, entropies = actor(
            batch,
            learner.distribution,
            None if e.states is None else e.states.select(rows),
            with_entropy=config.entropy_coef > 0,
        )
        policy = policy_loss(
            logprobs,
            old_logprobs,
            e.advantages[rows, :width],
            mask,
            ratio=config.policy_ratio,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
            weights=None if weights is None else weights[rows, :width],
            aggregation=config.loss_aggregation,
            denominator=denominator,
        )
        loss, share = policy.loss, mask.sum() / num_tokens
        if config.kl_in == "loss":
            kl = estimate_kl(logprobs, e.ref_logprobs[rows, :width], mask, config.kl_estimator, config.kl_clamp)
            kl_loss = aggregate(kl, mask, config.loss_aggregation, denominator)
            loss = loss + e.kl_coef * kl_loss
            sums["loss/kl"] = sums["loss/kl"] + kl_loss.detach()
        if config.entropy_coef:
            bonus = aggregate(entropies, mask, config.loss_aggregation, denominator)
            loss = loss - config.entropy_coef * bonus
            sums["loss/entropy"] = sums["loss/entropy"] + bonus.detach()
        loss = _with_router_loss(loss, actor.router_loss, share, sums, "actor")
        engine.backward(loss, last=demonstrations is None and number == len(passes))
        sums["loss/policy"] = sums["loss/policy"] + policy.loss.detach()
        sums["actor/clip_fraction"] = sums["actor/clip_fraction"] + (policy.clip_fraction * share)
        sums["actor/approx_kl"] = sums["actor/approx_kl"] + (policy.approx_kl * share)
        ratio_errors.append(((logprobs.detach() - old_logprobs).exp() - 1).abs().max())
    for loss, is_last in () if demonstrations is None else demonstrations.losses(step):
        engine.backward(config.ptx_coef * loss, last=is_last)
        sums["loss/ptx"] = sums["loss/ptx"] + loss.detach()
    values = _totals(sums, learner.group)
    values["ratio_error"] = learner.group.max(torch.stack(ratio_errors).max()).item()
    return values | _step(engine, "actor")


def _critic_step(
    learner: Learner, e: Experience, passes: list[Tensor], denominator: Tensor, num_tokens: Tensor
) -> dict[str, float]:
    critic, config, engine = learner.models.critic, learner.config, learner.engines["critic"]
    assert critic is not None and e.old_values is not None
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for number, rows in enumerate(passes, start=1):
        batch = e.batch.select(rows)
        width = batch.response_ids.shape[1]
        mask, needs_states = e.loss_mask[rows, :width], e.states is not None and e.features is None
        loss = value_loss(
            critic(
                batch,
                e.states.select(rows) if needs_states and e.states is not None else None,
                None if e.features is None else e.features.select(rows),
            ),
            e.old_values[rows, :width],
            e.returns[rows, :width],
            mask,
            value_clip_range=config.value_clip_range,
            aggregation=config.loss_aggregation,
            denominator=denominator,
        )
        sums["loss/value"] = sums["loss/value"] + loss.detach()
        share = mask.sum() / num_tokens
        loss = _with_router_loss(config.critic.loss_coef * loss, critic.router_loss, share, sums, "critic")
        engine.backward(loss, last=number == len(passes))
    return _totals(sums, learner.group) | _step(engine, "critic")


def _with_router_loss(
    loss: Tensor, router_loss: Tensor | None, share: Tensor, sums: dict[str, Tensor], name: str
) -> Tensor:
    """Add the pass's share of the router's auxiliary loss, if the model has one, and its metric."""
    if router_loss is None:
        return loss
    sums[f"{name}/router_loss"] = sums[f"{name}/router_loss"] + (share * router_loss.detach())
    return loss + share * router_loss


def _totals(sums: dict[str, Tensor], group: Group) -> dict[str, float]:
    """The sums over all ranks."""
    return dict(zip(sums, group.sum(torch.stack(list(sums.values()))).tolist(), strict=True))


def _step(engine: TrainEngine, name: str) -> dict[str, float]:
    info = engine.step()
    return {f"{name}/grad_norm": info.grad_norm, f"{name}/learning_rate": info.learning_rate}


def _importance(learner: Learner, e: Experience) -> tuple[Tensor | None, dict[str, float]]:
    """Weight [B, T] of each token, trainer against rollout engine, the same in every epoch; and its metrics. None if off."""
    if learner.config.importance_clip is None:
        return None, {}
    low, high = learner.config.importance_clip
    mask, reduce = e.batch.response_mask & ~e.failed[:, None], learner.group.sum
    weights, outside = importance_weights(
        e.old_logprobs, e.engine_logprobs, mask, mode=learner.config.importance_mode, low=low, high=high
    )
    return weights, {
        "importance/mean": masked_moments(weights, mask, reduce)[0].item(),
        "importance/clipped": masked_moments(outside.float(), mask, reduce)[0].item(),
    }


def _epoch_order(size: int, *, seed: int, iteration: int, epoch: int) -> list[int]:
    """Row order of an epoch after the first; it depends on its arguments alone, so that a resumed run repeats it."""
    generator = torch.Generator().manual_seed(derive_seed("epoch order", seed, iteration, epoch))
    return torch.randperm(size, generator=generator).tolist()
