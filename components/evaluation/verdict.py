"""The numbers of a comparison, and the gate's decision on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from components.evaluation.compare import Comparison
from components.evaluation.statistics import bootstrap_mean, distinct_2, wins
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.data.records import Completion


@dataclass(frozen=True, kw_only=True)
class Decision:
    decision: str  # promote or reject
    reason: str


def summarise(
    comparison: Comparison, config: EvaluationConfig, *, accuracy: Mapping[str, float], seed: int
) -> dict[str, float]:
    """Every number of the verdict. Prompts are the unit of each interval.

    accuracy holds the agreement of judge and reward_model with people on held-out pairs, of each where it was measured.
    """
    sft, ppo = comparison.sft, comparison.ppo
    options = {"num_resamples": config.num_bootstrap, "confidence": config.confidence, "seed": seed}
    rate = bootstrap_mean(wins(ppo.judge_scores, sft.judge_scores), **options)
    matched = matching_rows(sft.completions, ppo.completions)
    at_match = wins(np.array(ppo.judge_scores)[matched], np.array(sft.judge_scores)[matched])
    # Where no prompt got two answers of equal length and ending, nothing is known: 0.5, from 0 to 1.
    matched_rate = bootstrap_mean(at_match, **options) if len(at_match) else None
    cut_rate = bootstrap_mean(wins(ppo.cut_judge_scores, sft.cut_judge_scores), **options)
    kl = bootstrap_mean(np.array(comparison.kl), **options)
    numbers: dict[str, float] = {
        "num_prompts": len(comparison.prompts),
        "confidence": config.confidence,
        "win_rate": rate.value,
        "win_rate_low": rate.low,
        "win_rate_high": rate.high,
        "num_matched": len(at_match),
        "win_rate_matched": matched_rate.value if matched_rate else 0.5,
        "win_rate_matched_low": matched_rate.low if matched_rate else 0.0,
        "win_rate_matched_high": matched_rate.high if matched_rate else 1.0,
        "win_rate_cut": cut_rate.value,
        "win_rate_cut_low": cut_rate.low,
        "win_rate_cut_high": cut_rate.high,
        "reward_win_rate": float(wins(ppo.rewards, sft.rewards).mean()),
        "kl": kl.value,
        "kl_low": kl.low,
        "kl_high": kl.high,
        **{f"{role}_accuracy": value for role, value in accuracy.items()},
    }
    for name, side in (("sft", sft), ("ppo", ppo)):
        numbers |= {
            f"judge_score_{name}": float(np.mean(side.judge_scores)),
            f"reward_{name}": float(np.mean(side.rewards)),
            f"length_{name}": float(np.mean([len(c.response_ids) for c in side.completions])),
            f"eos_rate_{name}": float(np.mean([not c.truncated for c in side.completions])),
            f"distinct2_{name}": distinct_2([c.response for c in side.completions]),
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
    """Promote when the win rate is surely above the gate's and the KL within it."""
    low, kl = numbers["win_rate_low"], numbers["kl"]
    rate = f"win rate {numbers['win_rate']:.3f} [{low:.3f}, {numbers['win_rate_high']:.3f}]"
    reasons = []
    if not low > gate.min_win_rate:
        reasons.append(f"{rate}: its lower end is not above {gate.min_win_rate:g}")
    if not kl <= gate.max_kl:
        reasons.append(f"KL {kl:.2f} nats per response is above {gate.max_kl:g}")
    if reasons:
        return Decision(decision="reject", reason="; ".join(reasons))
    return Decision(
        decision="promote", reason=f"{rate} lies above {gate.min_win_rate:g}, and KL {kl:.2f} is within {gate.max_kl:g}"
    )
