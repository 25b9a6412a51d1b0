"""The numbers of a comparison, and the gate's decision on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.evaluation.compare import Comparison
from components.evaluation.statistics import Interval, bootstrap_mean, distinct_2, pairwise_wins
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.data.records import Completion


@dataclass(frozen=True, kw_only=True)
class Decision:
    decision: str  # promote or reject
    reason: str


def summarize(
    comparison: Comparison, config: EvaluationConfig, *, accuracy: Mapping[str, float], seed: int
) -> dict[str, float]:
    """All numbers of the comparison, with confidence intervals over prompts.

    accuracy maps judge and reward_model to their accuracy on held-out human pairs, if it was measured.
    """
    sft, ppo = comparison.sft, comparison.ppo
    options = {"num_resamples": config.num_bootstrap, "confidence": config.confidence, "seed": seed}
    win_rate = bootstrap_mean(pairwise_wins(ppo.judge_scores, sft.judge_scores), **options)
    matched = matching_rows(sft.completions, ppo.completions)
    matched_wins = pairwise_wins(np.array(ppo.judge_scores)[matched], np.array(sft.judge_scores)[matched])
    # Without prompts whose two responses are equal in length and ending, the rate is unknown: 0.5 in [0, 1].
    unknown = Interval(value=0.5, low=0.0, high=1.0)
    matched_rate = bootstrap_mean(matched_wins, **options) if len(matched_wins) else unknown
    cut_rate = bootstrap_mean(pairwise_wins(ppo.cut_judge_scores, sft.cut_judge_scores), **options)
    kl = bootstrap_mean(np.array(comparison.kl), **options)
    numbers: dict[str, float] = {
        "num_prompts": len(comparison.prompts),
        "confidence": config.confidence,
        **win_rate.named("win_rate"),
        "num_matched": len(matched_wins),
        **matched_rate.named("win_rate_matched"),
        **cut_rate.named("win_rate_cut"),
        "reward_win_rate": float(pairwise_wins(ppo.rewards, sft.rewards).mean()),
        **kl.named("kl"),
        **{f"{role}_accuracy": value for role, value in accuracy.items()},
    }
    for name, scored in (("sft", sft), ("ppo", ppo)):
        numbers |= {
            f"judge_score_{name}": float(np.mean(scored.judge_scores)),
            f"reward_{name}": float(np.mean(scored.rewards)),
            f"length_{name}": float(np.mean([len(c.response_ids) for c in scored.completions])),
            f"eos_rate_{name}": float(np.mean([not c.truncated for c in scored.completions])),
            f"distinct2_{name}": distinct_2([c.response for c in scored.completions]),
        }
    return numbers


def matching_rows(sft: Sequence[Completion], ppo: Sequence[Completion]) -> NDArray[np.int64]:
    """Indices of prompts whose two responses have the same number of tokens and the same ending (EOS or truncated)."""
    rows = [
        number
        for number, (a, b) in enumerate(zip(sft, ppo, strict=True))
        if len(a.response_ids) == len(b.response_ids) and a.truncated == b.truncated
    ]
    return np.array(rows, dtype=np.int64)


def decide(numbers: dict[str, float], gate: GateConfig) -> Decision:
    """Promote if the lower end of the win rate's interval is above min_win_rate and the KL is at most max_kl."""
    low, kl = numbers["win_rate_low"], numbers["kl"]
    rate = f"win rate {numbers['win_rate']:.3f} [{low:.3f}, {numbers['win_rate_high']:.3f}]"
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
