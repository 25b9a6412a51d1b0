"""Losses of each source, composed of the functions in components/rlhf/maths."""

import math
from typing import Any, cast, get_args

import torch
from torch import Tensor

from components.rlhf.maths.importance import (
    ImportanceMode,
    RejectionStatistic,
    importance_weights,
    normalize_weights,
    rejection_mask,
)
from components.rlhf.maths.losses import Aggregation, PolicyRatio, pairwise_loss, policy_loss, value_loss
from components.rlhf.maths.masked import masked_mean
from components.rlhf.maths.preferences import dpo_loss, ipo_loss, kl_of_mismatches, kto_loss, robust_loss, simpo_loss
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
            return "sequence-sum", rows
        case "seq-mean-token-sum-norm":
            return "sequence-sum-norm", params.get("loss_scale_factor")
    raise UnknownVariant(f"aggregation {name}")


def policy(case: Case, weights: Tensor | None = None) -> dict[str, Any]:
    p, mask = case.params, case.mask()
    logp, old_logp = case.floats("logp").requires_grad_(), case.floats("old_logp")
    advantages = case.floats("advantages")
    low = p["clip_eps_low"] if "clip_eps_low" in p else p["clip_eps"]
    high, dual_clip = p.get("clip_eps_high"), p.get("dual_clip")
    clamp = p.get("log_ratio_clamp", 20.0 if case.origin == "verl" else None)
    aggregation, denominator = reduction(p, mask)
    kind: PolicyRatio
    match p.get("policy_loss_type", "ppo"), case.origin:
        case "ppo", _:
            kind = "token"
        case "gspo", "openrlhf_head":
            kind = "gspo"
        case "gspo", "verl":
            kind, clamp = "gspo-token", 10.0
        case "cispo", "verl":
            kind = "cispo"
        case unknown:
            raise UnknownVariant(f"policy loss {unknown}")
    tensors = (logp, old_logp, advantages, mask)
    clips: dict[str, Any] = {"clip_range": low, "clip_range_high": high, "log_ratio_clamp": clamp, "ratio": kind}
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
    """Only the weights or the kept tokens, or the policy loss with them, where old log-probs are the trainer's."""
    p, mask = case.params, case.mask()
    with_loss = "logp" in case.inputs
    trainer, engine = case.floats("old_logp" if with_loss else "trainer_logp"), case.floats("rollout_logp")
    kind = p["kind"]
    if kind not in WEIGHTS:
        return {"kept_mask": kept_tokens(case, trainer, engine, kind.split(","))}
    bounds = {"low": p["low"] if "low" in p else math.exp(-p.get("safety_bound", 20.0)), "high": p["high"]}
    weights, _ = importance_weights(trainer, engine, mask, mode=WEIGHTS[kind], **bounds)
    if p.get("batch_normalize"):
        weights = normalize_weights(weights, mask, by_response=kind == "sequence")
    if not with_loss:
        return {"weights": weights if case.origin == "openrlhf_head" else torch.where(mask, weights, 0)}
    return policy(case, weights) | {"rollout_kl": masked_mean(engine - trainer, mask)}


# verl only bounds its log-ratio from below.
WEIGHTS: dict[str, ImportanceMode] = {
    "tis": "truncate",
    "icepop": "mask",
    "seq-mask-tis": "sequence-mask",
    "token": "truncate",
    "sequence": "sequence-truncate",
}


def kept_tokens(case: Case, trainer: Tensor, engine: Tensor, statistics: list[str]) -> Tensor:
    """verl's rejection by several statistics, each with a threshold, `high` or `low_high`, or all with the same."""
    thresholds = str(case.params["threshold"]).split(",")
    kept = case.mask()
    for number, statistic in enumerate(statistics):
        if statistic not in get_args(RejectionStatistic):
            raise UnknownVariant(f"importance correction {statistic}")
        *low, high = (float(x) for x in thresholds[number if len(thresholds) > 1 else 0].split("_"))
        bounds = (low[0] if low else None, high)
        kept = kept & rejection_mask(trainer, engine, case.mask(), cast(RejectionStatistic, statistic), *bounds)
    return kept


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


def preferences(case: Case) -> dict[str, Any]:
    """Losses of TRL on preferences, their gradients by token, and the rewards."""
    p, mask = case.params, case.mask()
    logp = case.floats("logp").requires_grad_()
    sums, lengths = torch.where(mask, logp, 0).sum(1), mask.sum(1)
    log_ratios = sums - torch.where(mask, case.floats("ref_logp"), 0).sum(1)
    beta = p["beta"]
    if p["loss"] == "kto":
        return _answers(case, logp, log_ratios)
    by_token = sums / lengths if p["loss"] == "simpo" else log_ratios / lengths
    (chosen, rejected), (mean_chosen, mean_rejected) = log_ratios.chunk(2), by_token.chunk(2)
    match p["loss"]:
        case "dpo":
            losses = dpo_loss(chosen, rejected, beta=beta)
        case "cdpo":
            losses = dpo_loss(chosen, rejected, beta=beta, label_smoothing=p["label_smoothing"])
        case "robust":
            losses = robust_loss(chosen, rejected, beta=beta, label_smoothing=p["label_smoothing"])
        case "ipo":
            losses = ipo_loss(mean_chosen, mean_rejected, beta=beta)
        case "simpo":
            losses = simpo_loss(mean_chosen, mean_rejected, beta=beta, gamma=p["gamma"])
        case other:
            raise UnknownVariant(f"loss {other}")
    losses.mean().backward()
    rewards = beta * (by_token if p["loss"] == "simpo" else log_ratios)
    good, bad = rewards.chunk(2)
    return {
        "loss": losses.mean(),
        "losses": losses,
        "grad": logp.grad,
        "rewards_chosen": good.mean(),
        "rewards_rejected": bad.mean(),
        "rewards_accuracies": (good > bad).double().mean(),
    }


def _answers(case: Case, logp: Tensor, log_ratios: Tensor) -> dict[str, Any]:
    p, is_desirable = case.params, case.mask("label")
    mismatched = case.floats("mismatched_logp") - case.floats("mismatched_ref_logp")
    kl = kl_of_mismatches(mismatched.sum(), len(mismatched))
    weights = {name: p[name] for name in ("desirable_weight", "undesirable_weight")}
    loss = kto_loss(log_ratios, is_desirable, kl, beta=p["beta"], **weights).mean()
    loss.backward()
    rewards = p["beta"] * log_ratios
    return {
        "loss": loss,
        "kl": kl,
        "grad": logp.grad,
        "rewards_chosen": rewards[is_desirable].mean(),
        "rewards_rejected": rewards[~is_desirable].mean(),
    }
