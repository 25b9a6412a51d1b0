"""The numbers of a comparison, and the gate's decision on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged
from components.evaluation.statistics import (
    Bootstrap,
    bootstrap_mean,
    cohen_kappa,
    distinct_2,
    length_controlled,
    pairwise_wins,
    pass_rate,
)
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.data.records import Completion
from components.rlhf.text.comparison_table import method_of

PASS = 1.0  # the score of a right response


@dataclass(frozen=True, kw_only=True)
class Decision:
    decision: str  # promote or reject
    reason: str


def summarize(
    comparison: Comparison,
    judges: Sequence[Judged],
    config: EvaluationConfig,
    *,
    reward_accuracy: str | int | float | None,
    seed: int,
) -> dict[str, float]:
    """All numbers of the comparison, with confidence intervals over prompts.

    Those of the first judge, which decides, have no prefix; those of the others start with judges/NAME/. A judge that cannot tell has no
    win rate and no scores. reward_accuracy is the reward model's accuracy on held-out human pairs, if it was measured.
    """
    bootstrap = Bootstrap(num_resamples=config.num_bootstrap, confidence=config.confidence, seed=seed)
    groups, sft, policy = comparison.groups, comparison.sft, comparison.policy
    numbers: dict[str, float] = {
        "num_prompts": len(set(groups)),
        **({"num_failed": comparison.num_failed} if comparison.num_failed else {}),
        "num_samples": config.num_samples,
        "confidence": config.confidence,
    }
    for number, judge in enumerate(judges):
        prefix = f"judges/{judge.name}/" if number else ""
        numbers |= {prefix + name: value for name, value in judge_numbers(judge, comparison, bootstrap).items()}
    for a, b in combinations([judge for judge in judges if not judge.cannot_tell], 2):
        kappa = cohen_kappa(a.wins, b.wins)
        if kappa is not None:
            numbers[f"kappa/{a.name}/{b.name}"] = kappa
    for name, values in (("kl", comparison.kl), ("kl_exact", comparison.exact_kl)):
        interval = bootstrap_mean(np.array(values), groups, bootstrap)
        numbers |= interval.named(name) if interval else {}
    if policy.rewards is not None and sft.rewards is not None:
        numbers["reward_win_rate"] = float(pairwise_wins(policy.rewards, sft.rewards).mean())
    if reward_accuracy is not None:
        numbers["reward_model_accuracy"] = float(reward_accuracy)
    distinct = distinct_2([c.response for c in sft.completions], [c.response for c in policy.completions])
    for name, responses, distinct2 in (("sft", sft, distinct[0]), (comparison.method, policy, distinct[1])):
        numbers |= {} if responses.rewards is None else {f"reward_{name}": float(np.mean(responses.rewards))}
        numbers |= {
            f"length_{name}": float(np.mean([c.num_model_tokens for c in responses.completions])),
            f"eos_rate_{name}": float(np.mean([not c.truncated for c in responses.completions])),
            f"distinct2_{name}": distinct2,
        }
    return numbers


def judge_numbers(judge: Judged, comparison: Comparison, bootstrap: Bootstrap) -> dict[str, float]:
    """Win rates and scores of one judge, if it can tell; its agreement with people and what it took in any case."""
    groups, sft, policy = comparison.groups, comparison.sft.completions, comparison.policy.completions
    answered = ~np.isnan(judge.wins)
    numbers: dict[str, float] = {
        "num_compared": len({group for group, known in zip(groups, answered, strict=True) if known}),
        "num_unanswered": int((~answered).sum()),
        **{f"judge_{name}": value for name, value in judge.counts.items()},
    }
    agreement = judge.entry.agreement
    if agreement is not None:
        numbers |= {
            "judge_accuracy": agreement.accuracy,
            "judge_accuracy_low": agreement.low,
            "judge_accuracy_high": agreement.high,
            "judge_accuracy_longer": agreement.longer_wins,
        }
    asked = answered & np.array([a.response != b.response for a, b in zip(sft, policy, strict=True)])
    if judge.is_pairwise and asked.any():
        numbers["judge_consistency"] = float(np.array(judge.consistent)[asked].mean())
    if judge.cannot_tell:
        return numbers
    matched = matching_rows(sft, policy)
    gaps = np.array(
        [b.num_model_tokens - a.num_model_tokens for a, b in zip(sft, policy, strict=True)], dtype=np.float64
    )
    rates = {
        "win_rate": bootstrap_mean(judge.wins, groups, bootstrap),
        "win_rate_length_controlled": length_controlled(judge.wins, gaps, groups, bootstrap),
        "win_rate_matched": bootstrap_mean(judge.wins[matched], np.array(groups)[matched].tolist(), bootstrap),
        "win_rate_cut": None if judge.cut_wins is None else bootstrap_mean(judge.cut_wins, groups, bootstrap),
    }
    for name, interval in rates.items():
        numbers |= interval.named(name) if interval else {}
    numbers["num_matched"] = len(matched)
    if judge.sft_scores is not None and judge.policy_scores is not None:
        numbers["judge_score_sft"] = float(np.mean(judge.sft_scores))
        numbers[f"judge_score_{comparison.method}"] = float(np.mean(judge.policy_scores))
        if judge.verifies:
            numbers |= pass_numbers(judge.sft_scores, judge.policy_scores, comparison, bootstrap)
    return numbers


def pass_numbers(
    sft_scores: Sequence[float], policy_scores: Sequence[float], comparison: Comparison, bootstrap: Bootstrap
) -> dict[str, float]:
    """pass@1 of both models and their difference, with intervals. A response passes with a score of at least 1."""
    groups = comparison.groups
    sft, policy = (np.array(scores) >= PASS for scores in (sft_scores, policy_scores))
    gain = bootstrap_mean(policy.astype(np.float64) - sft.astype(np.float64), groups, bootstrap)
    assert gain is not None
    return {
        **pass_rate(sft.astype(np.float64), groups, bootstrap).named("pass_at_1_sft"),
        **pass_rate(policy.astype(np.float64), groups, bootstrap).named(f"pass_at_1_{comparison.method}"),
        **gain.named("pass_at_1_gain"),
    }


def matching_rows(sft: Sequence[Completion], policy: Sequence[Completion]) -> NDArray[np.int64]:
    """Indices of rows whose two responses have the same number of tokens and the same ending (EOS or truncated)."""
    rows = [
        number
        for number, (a, b) in enumerate(zip(sft, policy, strict=True))
        if a.num_model_tokens == b.num_model_tokens and a.truncated == b.truncated
    ]
    return np.array(rows, dtype=np.int64)


def decide(numbers: Mapping[str, float], judge: Judged, gate: GateConfig) -> Decision:
    """Promote if the lower end of the win rate's interval is above min_win_rate and the KL is at most max_kl.

    There is no verdict, and nothing is promoted, if the judge cannot tell or has compared fewer than min_prompts prompts.
    """
    if judge.cannot_tell:
        return Decision(
            decision="reject", reason=f"no verdict: the judge {judge.name} cannot tell, because {judge.cannot_tell}"
        )
    if numbers["num_compared"] < gate.min_prompts:
        return Decision(
            decision="reject",
            reason=f"no verdict: {numbers['num_compared']:.0f} prompts are too few, gate.min_prompts is {gate.min_prompts}; raise "
            "evaluation.num_prompts",
        )
    low, kl = numbers["win_rate_low"], numbers["kl"]
    rate = f"win rate {numbers['win_rate']:.3f} [{low:.3f}, {numbers['win_rate_high']:.3f}]"
    if "pass_at_1_sft" in numbers:
        rate += f" (pass@1 {numbers['pass_at_1_sft']:.3f} to {numbers[f'pass_at_1_{method_of(numbers)}']:.3f})"
    reasons = []
    if not low > gate.min_win_rate:
        reasons.append(f"{rate}: lower end of the interval is not above {gate.min_win_rate:g}")
    if not kl <= gate.max_kl:
        reasons.append(f"KL {kl:.2f} nats per response is above {gate.max_kl:g}")
    if reasons:
        return Decision(decision="reject", reason="; ".join(reasons))
    return Decision(
        decision="promote", reason=f"{rate} is above {gate.min_win_rate:g}, and KL {kl:.2f} is at most {gate.max_kl:g}"
    )
