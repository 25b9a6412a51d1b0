from dataclasses import replace
from typing import Any

import pytest

from components.evaluation.findings import Finding, findings_of
from components.evaluation.judging import Judged
from components.rlhf.rewards.agreement import Agreement
from tests.support.comparisons import CHANCE, GOOD, judged_of, pairwise_of

NUMBERS = {
    "confidence": 0.95, "win_rate": 0.7, "win_rate_low": 0.6, "win_rate_high": 0.8, "length_ppo": 9.0,
    "win_rate_cut": 0.65, "win_rate_cut_low": 0.55, "win_rate_cut_high": 0.75, "reward_win_rate": 0.9,
    "distinct2_sft": 0.8, "distinct2_ppo": 0.776, "eos_rate_sft": 0.5, "eos_rate_ppo": 0.9,
}  # fmt: skip
JUDGE = judged_of([0.0], [1.0])


def curve(*judge: float, fall: float = 0.5, error: float = 0.1) -> list[dict[str, float]]:
    """Validation passes after iterations 0, 4, 8, ... with these scores of the judge; the reward and the KL rise by 1 in each."""
    return [
        {"iteration": 4.0 * i, "reward": float(i), "judge_score": score, "kl": float(i), "judge_fall": fall, "judge_fall_se": error}
        for i, score in enumerate(judge)
    ]  # fmt: skip


def find(question: str, numbers: dict[str, float] = NUMBERS, judge: Judged = JUDGE, **given: Any) -> Finding | None:
    found = findings_of(numbers, [judge], given.get("training", []), given.get("policy", {}))
    return next((finding for finding in found if question in finding.question), None)


def answers(finding: Finding | None) -> tuple[str, str]:
    assert finding is not None
    return finding.answer, finding.tone


@pytest.mark.parametrize(
    ("low", "high", "answer", "tone"),
    [
        (0.51, 0.8, "Yes", "good"),
        (0.5, 0.8, "Not shown", "open"),
        (0.3, 0.5, "Not shown", "open"),
        (0.3, 0.49, "No", "bad"),
    ],
)
def test_policy_is_better_if_its_whole_interval_is(low: float, high: float, answer: str, tone: str) -> None:
    finding = find("better", NUMBERS | {"win_rate_low": low, "win_rate_high": high})
    assert answers(finding) == (answer, tone)
    assert finding is not None and f"The 95% interval of the win rate, {low:.3f} to {high:.3f}, " in finding.detail


def test_length_alone_may_win() -> None:
    assert answers(find("length")) == ("No", "good")
    finding = find("length", NUMBERS | {"win_rate_cut_low": 0.49})
    assert answers(finding) == ("It may", "bad")
    assert finding is not None and "with both cut to equal length 0.650 [0.490, 0.750]" in finding.detail
    assert find("length", NUMBERS | {"win_rate_low": 0.4}) is None  # there is no win to explain
    assert find("length", {name: v for name, v in NUMBERS.items() if "cut" not in name}) is None


def test_reward_is_over_optimized_if_the_exported_policy_comes_after_the_best_one_of_the_judge() -> None:
    training = curve(0.0, 1.0, 0.5)
    assert answers(find("over-optimize", training=training, policy={"kept_iteration": 8.0})) == ("Yes", "bad")
    assert answers(find("over-optimize", training=training)) == (
        "Yes",
        "bad",
    )  # without a choice, the last one is exported
    earlier = find("over-optimize", training=training, policy={"kept_iteration": 4.0})
    assert answers(earlier) == ("Not the exported one", "open")
    assert earlier is not None
    assert "From iteration 4 (KL 1.00) to 8 (KL 2.00) the reward rises from 1.000 to 2.000" in earlier.detail
    assert "falls from 1.000 to 0.500, by 0.500 with a standard error of 0.100." in earlier.detail
    assert (
        "after iteration 4, is none of these later passes. Win rate by the reward model 0.900, by the judge 0.700."
        in earlier.detail
    )
    noisy = find("over-optimize", training=curve(0.0, 1.0, 0.5, error=0.3))
    assert answers(noisy) == ("Not clear", "open")
    assert noisy is not None and "which is within noise" in noisy.detail
    assert answers(find("over-optimize", training=curve(0.0, 0.5, 1.0))) == ("Not seen", "good")


def test_without_curves_both_win_rates_are_compared() -> None:
    assert answers(find("over-optimize")) == ("Compare", "open")
    assert find("over-optimize", {name: v for name, v in NUMBERS.items() if name != "reward_win_rate"}) is None
    dpo = {name.replace("_ppo", "_dpo"): value for name, value in NUMBERS.items()}
    assert find("over-optimize", dpo) is None  # it has no reward
    assert answers(find("DPO better", dpo)) == ("Yes", "good")


def test_repetition_is_a_fall_of_the_unique_word_pairs() -> None:
    assert answers(find("repeat")) == ("\u22123% unique word pairs", "good")  # 0.776 / 0.8 - 1
    assert answers(find("repeat", NUMBERS | {"distinct2_ppo": 0.4})) == ("\u221250% unique word pairs", "open")
    assert answers(find("repeat", NUMBERS | {"distinct2_ppo": 0.88})) == ("+10% unique word pairs", "good")
    assert find("repeat", NUMBERS | {"distinct2_sft": 0.0}) is None


@pytest.mark.parametrize(
    ("agreement", "answer", "tone"), [(GOOD, "81% agreement", "good"), (CHANCE, "No", "bad"), (None, "No", "bad")]
)
def test_judge_is_as_reliable_as_its_agreement_with_people(agreement: Agreement | None, answer: str, tone: str) -> None:
    assert answers(find("relied on", judge=judged_of([0.0], [1.0], agreement=agreement))) == (answer, tone)


def test_judge_that_cannot_tell_answers_only_that() -> None:
    judge = replace(pairwise_of([float("nan")]), error="it is down")
    numbers = {name: value for name, value in NUMBERS.items() if not name.startswith("win_rate")}
    assert [f.answer for f in findings_of(numbers, [judge], [], {})] == ["\u22123% unique word pairs", "No"]
