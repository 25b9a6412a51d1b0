"""Computations of each source from log-probs to advantages, composed of the functions in components/rlhf/maths."""

from typing import Any

import torch
from torch import Tensor

from components.rlhf.maths.advantages import (
    GroupBaseline,
    estimate_advantages,
    reward_to_go,
    shape_group_scores,
)
from components.rlhf.maths.kl import adapt_kl_coef, estimate_kl
from components.rlhf.maths.masked import masked_mean, masked_moments, whiten
from components.rlhf.maths.rewards import token_rewards
from tests.golden.cases import Case, UnknownVariant


def kl_estimators(case: Case) -> dict[str, Any]:
    logp, ref_logp, mask = case.floats("logp").requires_grad_(), case.floats("ref_logp"), case.mask()
    estimator, inner = case.params["estimator"], case.params.get("inner_clamp")
    clamp = symmetric(case.params.get("clamp"))
    if estimator == "abs":
        kl = estimate_kl(logp, ref_logp, mask, "k1", clamp).abs()
    elif inner is not None and clamp is None:
        # verl clamps the difference before the estimator; a clamp of the result that is tighter needs no second one.
        kl = estimate_kl((logp - ref_logp).clamp(*inner), torch.zeros_like(logp), mask, estimator)
    else:
        kl = estimate_kl(logp, ref_logp, mask, estimator, clamp)
    kl.sum().backward()
    return {
        "kl": kl,
        "kl_seq_mean": torch.stack([masked_mean(row, real) for row, real in zip(kl, mask, strict=True)]),
        "kl_seq_sum_mean": kl.sum(dim=1).mean(),
        "grad_logp_of_masked_sum": logp.grad,
    }


def symmetric(bounds: list[float] | None) -> float | None:
    """[-c, c] -> c, the argument of estimate_kl."""
    if bounds is not None and bounds[0] != -bounds[1]:
        raise UnknownVariant(f"a clamp that is not symmetric: {bounds}")
    return None if bounds is None else bounds[1]


def adaptive_kl(case: Case) -> dict[str, Any]:
    coef, target, horizon = case.params["init_kl_coef"], case.params["target"], case.params["horizon"]
    after = []
    for kl, num_samples in zip(case.inputs["kl"], case.inputs["n_steps"], strict=True):
        coef = adapt_kl_coef(coef, kl, target=target, horizon=horizon, num_samples=num_samples)
        after.append(coef)
    return {"kl_coef_after": after}


def rewards(case: Case) -> dict[str, Any]:
    if case.origin in ("trl", "nplus"):
        return next_position(case)
    if "kl_rows" in case.inputs:
        return packed_rewards(case)
    mask, kl_coef = case.mask(), case.params["kl_coef"]
    if case.origin == "verl":
        # The score is already at its token.
        kl = estimate_kl(case.floats("logp"), case.floats("ref_logp"), mask)
        no_scores = torch.zeros(len(mask), dtype=torch.float64)
        token_scores = torch.where(mask, case.floats("token_level_scores"), 0)
        return {"rewards": token_scores + token_rewards(no_scores, kl, mask, kl_coef=kl_coef)}
    if "kl" in case.inputs:
        kl = case.floats("kl")
    else:
        clamp = symmetric(case.params.get("kl_clamp"))
        kl = estimate_kl(case.floats("logp"), case.floats("ref_logp"), mask, case.params["estimator"], clamp)
    result = token_rewards(case.floats("score"), kl, mask, kl_coef=kl_coef, reward_clip=reward_clip(case))
    return {"rewards": result, "reward_sum": result.sum(dim=1)}


def reward_clip(case: Case) -> tuple[float, float] | None:
    bounds = case.params["reward_clip_range"]
    return None if bounds is None else (bounds[0], bounds[1])


def packed_rewards(case: Case) -> dict[str, Any]:
    """Rows of different lengths: padded for token_rewards, and trimmed for the comparison."""
    lengths = case.inputs["num_actions"]
    kl = torch.zeros(len(lengths), max(lengths), dtype=torch.float64)
    mask = torch.zeros_like(kl, dtype=torch.bool)
    for row, values in enumerate(case.inputs["kl_rows"]):
        kl[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        mask[row, : len(values)] = True
    result = token_rewards(
        case.floats("score"), kl, mask, kl_coef=case.params["kl_coef"], reward_clip=reward_clip(case)
    )
    return {"reward_rows": [row[:length] for row, length in zip(result, lengths, strict=True)]}


def gae(case: Case) -> dict[str, Any]:
    if case.origin == "trl":
        return next_position(case)
    mask, gamma = case.mask(), case.params["gamma"]
    if "values" not in case.inputs:
        return {"returns": reward_to_go(case.floats("rewards"), mask, gamma=gamma)}
    values, gae_lambda = case.floats("values"), case.params["lam"]
    if case.origin == "openrlhf_head":
        token_reward = token_rewards(
            case.floats("score"), case.floats("kl"), mask, kl_coef=case.params["kl_coef"], reward_clip=reward_clip(case)
        )
    else:
        token_reward = case.floats("rewards")
    steps = mask
    if case.origin == "openrlhf_v0.5.5" and case.name.startswith(
        "gap"
    ):  # a gap is a step, with a value and a reward of 0
        values, token_reward, steps = values * mask, token_reward * mask, torch.ones_like(mask)
    advantages, returns = estimate_advantages(values, token_reward, steps, gamma=gamma, gae_lambda=gae_lambda)
    advantages, returns = (torch.where(mask, x, 0) for x in (advantages, returns))
    whitened = whiten_plus_eps(advantages, mask, bessel=True) if case.origin == "verl" else whiten(advantages, mask)
    return {"advantages_raw": advantages, "advantages_whitened": whitened, "returns": returns}


BASELINES: dict[str, GroupBaseline] = {
    "rloo": "rloo",
    "group_norm": "group_norm",
    "grpo": "group_norm",
    "dr_grpo": "dr_grpo",
    "reinforce_baseline": "reinforce++-baseline",
    "reinforce_plus_plus_baseline": "reinforce++-baseline",
    "opo": "opo",
}


def group_advantages(case: Case) -> dict[str, Any]:
    """Scores [P, N] of row p * N + s to advantages."""
    scores, mask, estimator = case.floats("scores"), case.mask(), case.params["estimator"]
    case.params.ignore(
        "index", "order", "permutation", "micro_batch_size"
    )  # how the source cut the rows does not matter
    eps = case.params.get("epsilon", 1e-9)
    if case.params.get("norm_adv_by_std_in_grpo") is False and estimator == "grpo":
        estimator = "dr_grpo"
    if estimator in BASELINES:
        lengths = mask.sum(dim=1).view_as(scores)
        shaped = shape_group_scores(scores, BASELINES[estimator], eps=eps, lengths=lengths).flatten()
    elif estimator in ("reinforce", "reinforce_plus_plus"):
        shaped = scores.flatten()
    else:
        raise UnknownVariant(f"estimator {estimator}")
    if case.origin == "openrlhf_head":
        return shaped_advantages(case, estimator, shaped, mask)
    gamma = case.params.get("gamma", 1.0)
    outcome = token_rewards(shaped, torch.zeros_like(mask, dtype=torch.float64), mask, kl_coef=0.0)
    advantages = returns = reward_to_go(outcome, mask, gamma=gamma)
    if estimator.startswith("reinforce"):
        advantages = torch.where(mask, whiten_plus_eps(returns, mask, bessel=True), 0)
    return {"advantages": advantages, "returns": returns}


def shaped_advantages(case: Case, estimator: str, shaped: Tensor, mask: Tensor) -> dict[str, Any]:
    """OpenRLHF: clip and KL penalty after the baseline; whitening only for the REINFORCE forms, a discount only for plain ones."""
    p, scores = case.params, case.floats("scores")
    gamma = p["gamma"] if estimator == "reinforce" else 1.0
    p.ignore("gamma", "no_std_norm")
    reward = token_rewards(shaped, case.floats("kl"), mask, kl_coef=p["kl_coef"], reward_clip=reward_clip(case))
    advantages = returns = reward_to_go(reward, mask, gamma=gamma)
    if estimator.startswith("reinforce"):
        centred = returns - masked_moments(returns, mask)[0]
        advantages = centred if p["no_std_norm"] else whiten(returns, mask)
    return {
        "shaped_score": shaped,
        "advantages": advantages,
        "returns": returns,
        "group_reward_std": scores.std(dim=1).repeat_interleave(scores.shape[1]),
    }


def next_position(case: Case) -> dict[str, Any]:
    """TRL and N+: the score is one position after the last token, and mask_p1 includes that position."""
    p, mask, mask_p1 = case.params, case.mask(), case.mask("mask_p1")
    bessel = case.origin == "trl"
    scores = case.floats("score")
    penalty = p.get("missing_eos_penalty")
    if penalty is not None:
        has_eos = (case.ints("response_ids") == p["eos_id"]).any(dim=1)
        scores = torch.where(has_eos, scores, scores - penalty)
    p.ignore("eos_id", "pad_id")  # not needed without a penalty
    kl = estimate_kl(case.floats("logp"), case.floats("ref_logp"), mask, p["estimator"])
    reward = token_rewards(scores, kl, mask_p1, kl_coef=p["kl_coef"])
    if p.get("whiten_rewards"):
        reward = torch.where(mask_p1, whiten_plus_eps(reward, mask_p1, bessel=bessel, shift_mean=False), 0)
    values = case.floats("values")
    advantages, returns = estimate_advantages(values, reward, mask_p1, gamma=p["gamma"], gae_lambda=p["lam"])
    whitened = torch.where(mask, whiten_plus_eps(advantages, mask, bessel=bessel), 0)
    return {
        "score_after_penalty": scores,
        "rewards": reward,
        "values_filled": torch.where(mask_p1, values, 0),
        "advantages_raw": advantages,
        "advantages_whitened": whitened,
        "returns": returns,
    }


def whitening(case: Case) -> dict[str, Any]:
    x, mask, shift_mean = case.floats("x"), case.mask(), case.params["shift_mean"]
    if case.params.get("no_std_norm"):
        mean, _ = masked_moments(x, mask)
        return {"y": x - mean}
    match case.params["variance"], case.params["eps"]:
        case "biased", "clamp(var,min=1e-8)":
            return {"y": whiten(x, mask, shift_mean=shift_mean)}
        case ("biased" | "bessel") as variance, "var+1e-8":
            return {"y": whiten_plus_eps(x, mask, bessel=variance == "bessel", shift_mean=shift_mean)}
        case unknown:
            raise UnknownVariant(f"whitening by {unknown}")


def whiten_plus_eps(x: Tensor, mask: Tensor, *, bessel: bool, shift_mean: bool = True) -> Tensor:
    """The whitening of verl and TRL (Bessel) and of N+ (biased): epsilon is added instead of a floor."""
    mean, variance = masked_moments(x, mask)
    if bessel:
        variance = variance * mask.sum() / (mask.sum() - 1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean
