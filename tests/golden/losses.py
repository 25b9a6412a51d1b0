"""Losses of each source, composed of the functions in components/rlhf/maths."""

import math
from typing import Any

import torch
from torch import Tensor

from components.rlhf.maths.importance import importance_weights
from components.rlhf.maths.losses import Aggregation, denominator_of, pairwise_loss, policy_loss, value_loss
from components.rlhf.maths.masked import masked_mean
from tests.golden.cases import Case, Params, UnknownVariant


def reduction(params: Params, mask: Tensor) -> tuple[Aggregation, Tensor | float | None]:
    """The source's aggregation as aggregation and denominator of components/rlhf/maths/losses.py."""
    name, tokens, rows = params["aggregation"], params.get("batch_num_tokens"), params.get("global_batch_size")
    match name:
        case "token-mean":
            return "token-mean", tokens
        case "seq-mean-token-mean":
            return "sequence-mean", rows
        case "seq-mean-token-sum":
            return "token-mean", denominator_of(mask, "sequence-mean") if rows is None else rows
        case "seq-mean-token-sum-norm":
            return "token-mean", mask.shape[1]
    raise UnknownVariant(f"aggregation {name}")


def policy(case: Case, weights: Tensor | None = None) -> dict[str, Any]:
    p, mask = case.params, case.mask()
    logp, old_logp = case.floats("logp").requires_grad_(), case.floats("old_logp")
    advantages = case.floats("advantages")
    low = p["clip_eps_low"] if "clip_eps_low" in p else p["clip_eps"]
    high, dual_clip = p.get("clip_eps_high"), p.get("dual_clip")
    clamp = p.get("log_ratio_clamp", 20.0 if case.origin == "verl" else None)
    aggregation, denominator = reduction(p, mask)
    new_logp = logp
    match p.get("policy_loss_type", "ppo"):
        case "gspo":
            # One ratio per row, the geometric mean of its tokens' ratios.
            difference = torch.where(mask, logp - old_logp, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            new_logp = old_logp + difference[:, None]
        case kind if kind != "ppo":
            raise UnknownVariant(f"policy loss {kind}")
    tensors = (new_logp, old_logp, advantages, mask)
    clips = {"clip_range": low, "clip_range_high": high, "log_ratio_clamp": clamp}
    result = policy_loss(
        *tensors, **clips, dual_clip=dual_clip, weights=weights, aggregation=aggregation, denominator=denominator
    )
    # A shard's loss times the number of shards, because the engine averages over shards.
    loss = result.loss * p.get("dp_size", 1)
    loss.backward()
    approx_kl = result.approx_kl
    if case.origin == "verl":  # computed after the clamp, not before
        approx_kl = masked_mean((old_logp - logp).clamp(-clamp, clamp), mask)
    results = {
        "loss": loss,
        "grad_logp": logp.grad,
        "per_token_loss": result.per_token,
        "clip_frac": result.clip_fraction,
        "approx_kl": approx_kl,
    }
    if dual_clip is not None:
        free = policy_loss(*tensors, **clips).per_token
        bounded = (advantages < 0) & (free > -dual_clip * advantages)
        results["clip_frac_lower"] = masked_mean(bounded.double(), mask)
    return results


def importance(case: Case) -> dict[str, Any]:
    """Only the weights, or the policy loss with them, where old log-probs are the trainer's."""
    p, mask = case.params, case.mask()
    with_loss = "logp" in case.inputs
    trainer, engine = case.floats("old_logp" if with_loss else "trainer_logp"), case.floats("rollout_logp")
    match p["kind"]:
        case "tis":
            low = p["low"]
        case "token":  # verl only bounds the log-ratio from below
            low = math.exp(-p.get("safety_bound", 20.0))
        case kind:
            raise UnknownVariant(f"importance correction {kind}")
    weights, _ = importance_weights(trainer, engine, mask, low=low, high=p["high"])
    if p.get("batch_normalize"):
        weights = weights / masked_mean(weights, mask)
    if not with_loss:
        return {"weights": weights if case.origin == "openrlhf_head" else torch.where(mask, weights, 0)}
    return policy(case, weights) | {"rollout_kl": masked_mean(engine - trainer, mask)}


def value(case: Case) -> dict[str, Any]:
    p, mask = case.params, case.mask()
    values, old_values = case.floats("values").requires_grad_(), case.floats("old_values")
    returns = case.floats("returns")
    clip = p["value_clip"]
    aggregation, denominator = reduction(p, mask)
    loss = value_loss(
        values, old_values, returns, mask, value_clip_range=clip, aggregation=aggregation, denominator=denominator
    )
    loss = loss * p.get("dp_size", 1)
    loss.backward()
    results = {"loss": loss, "grad_values": values.grad}
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        worse = (clipped - returns) ** 2 > (values - returns) ** 2
        results["clip_frac"] = masked_mean(worse.double(), mask)
    return results


def reward_model(case: Case) -> dict[str, Any]:
    p = case.params
    chosen, rejected = case.floats("chosen").requires_grad_(), case.floats("rejected").requires_grad_()
    has_margin = p["margin"]
    match p["loss"]:
        case "sigmoid":
            loss = pairwise_loss(chosen, rejected, case.floats("margin") if has_margin else None).mean()
        case "logexp":  # the same function written as log(1 + exp(rejected - chosen)), without a margin
            loss = pairwise_loss(chosen, rejected).mean()
        case kind:
            raise UnknownVariant(f"reward model loss {kind}")
    centre = p.get("center_rewards_coefficient")
    if centre is not None:
        loss = loss + centre * ((chosen + rejected) ** 2).mean()
    loss.backward()
    return {
        "loss": loss,
        "grad_chosen": chosen.grad,
        "grad_rejected": rejected.grad,
        "accuracy": (chosen > rejected).double().mean(),
        "mean_margin": (chosen - rejected).mean(),
    }
