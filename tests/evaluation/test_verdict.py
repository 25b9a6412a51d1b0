import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged
from components.evaluation.statistics import Bootstrap, bootstrap_mean
from components.evaluation.verdict import decide, matching_rows, summarize
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from tests.support.comparisons import CHANCE, GOOD, both_of, comparison_of, judged_of, pairwise_of

CONFIG = EvaluationConfig(num_bootstrap=500)
GATE = GateConfig(min_win_rate=0.5, max_kl=10.0)
JUDGE = judged_of([0.0], [1.0])  # one that can tell
NAN = math.nan


def summary_of(comparison: Comparison, *judges: Judged, seed: int = 0, **options: Any) -> dict[str, float]:
    return summarize(comparison, judges, CONFIG, **({"reward_accuracy": None, "seed": seed} | options))


# The decision.


def numbers(low: float, kl: float, *, num_compared: int = 30) -> dict[str, float]:
    return {"num_compared": num_compared, "win_rate": 0.7, "win_rate_low": low, "win_rate_high": 0.9, "kl": kl}


@pytest.mark.parametrize(
    ("low", "kl", "decision"),
    [
        (0.501, 0.0, "promote"),
        (0.501, 10.0, "promote"),  # max_kl is inclusive
        (0.501, 10.001, "reject"),
        (0.5, 0.0, "reject"),  # min_win_rate is exclusive
        (0.499, 0.0, "reject"),
        (0.499, 11.0, "reject"),
        (math.nan, 0.0, "reject"),
        (0.9, math.nan, "reject"),
        (0.9, math.inf, "reject"),
        (0.9, -0.2, "promote"),  # an estimate of a KL of nearly 0 may be negative
    ],
)
def test_decision_at_the_thresholds(low: float, kl: float, decision: str) -> None:
    assert decide(numbers(low, kl), JUDGE, GATE).decision == decision


def test_reason_states_the_numbers() -> None:
    promoted = decide(numbers(0.6, 2.5), JUDGE, GATE).reason
    assert promoted == "win rate 0.700 [0.600, 0.900] is above 0.5, and KL 2.50 is at most 10"
    rejected = decide(numbers(0.4, 12.5), JUDGE, GateConfig(min_win_rate=0.55, max_kl=10.0)).reason
    assert rejected == (
        "win rate 0.700 [0.400, 0.900]: lower end of the interval is not above 0.55; KL 12.50 nats per response is above 10"
    )


def test_decision_uses_gate_config() -> None:
    assert decide(numbers(0.6, 2.0), JUDGE, GateConfig(min_win_rate=0.65)).decision == "reject"
    assert decide(numbers(0.1, 2.0), JUDGE, GateConfig(min_win_rate=0.0)).decision == "promote"
    assert decide(numbers(0.6, 2.0), JUDGE, GateConfig(max_kl=1.0)).decision == "reject"


@pytest.mark.parametrize(
    ("num_compared", "decision"), [(0, "reject"), (29, "reject"), (30, "promote"), (31, "promote")]
)
def test_too_few_prompts_give_no_verdict(num_compared: int, decision: str) -> None:
    found = decide(numbers(0.9, 0.0, num_compared=num_compared), JUDGE, GATE)
    assert found.decision == decision
    reason = (
        f"no verdict: {num_compared} prompts are too few, gate.min_prompts is 30; raise evaluation.num_prompts"
        if decision == "reject"
        else "win rate 0.700 [0.900, 0.900] is above 0.5, and KL 0.00 is at most 10"
    )
    assert found.reason == reason


def test_least_number_of_prompts_is_that_of_gate_config() -> None:
    assert decide(numbers(0.9, 0.0), JUDGE, GateConfig(min_prompts=31)).reason.startswith("no verdict: 30 prompts")
    assert decide(numbers(0.9, 0.0, num_compared=2), JUDGE, GateConfig(min_prompts=2)).decision == "promote"


def test_several_samples_do_not_make_up_for_few_prompts() -> None:
    """20 prompts with 4 responses each are 80 rows, but 20 prompts."""
    c = comparison_of([0.0] * 80, [1.0] * 80, groups=np.arange(20).repeat(4).tolist())
    judge = judged_of([0.0] * 80, [1.0] * 80)
    found = decide(summary_of(c, judge), judge, GATE)
    assert found.decision == "reject"
    assert found.reason.startswith("no verdict: 20 prompts are too few")


CANNOT_TELL = {
    "error": (
        pairwise_of([NAN] * 40, error="the endpoint rejects every request"),
        "the judge gpt cannot tell, because the endpoint rejects every request",
    ),
    "chance": (
        judged_of([0.0] * 40, [1.0] * 40, agreement=CHANCE),
        "the judge linear cannot tell, because its agreement with people, 52.0% [45.0%, 59.0%] on 200 held-out human "
        "pairs, is not above chance",
    ),
    "exactly chance": (
        judged_of([0.0] * 40, [1.0] * 40, agreement=replace(CHANCE, low=0.5)),
        "the judge linear cannot tell, because its agreement with people, 52.0% [50.0%, 59.0%] on 200 held-out human "
        "pairs, is not above chance",
    ),
    "no agreement": (
        pairwise_of([1.0] * 40, agreement=None),
        "the judge gpt cannot tell, because it answered none of the held-out human pairs",
    ),
    "few answers": (
        pairwise_of([1.0] * 32 + [NAN] * 8),
        "the judge gpt cannot tell, because it answered only 80% of the comparisons",
    ),
    "few answers with reasons": (
        pairwise_of([1.0] * 32 + [NAN] * 8, counts={"refused": 5.0, "unreadable": 0.0, "rejected": 11.0}),
        "the judge gpt cannot tell, because it answered only 80% of the comparisons (5 refused, 11 rejected)",
    ),
}


@pytest.mark.parametrize(("judge", "reason"), CANNOT_TELL.values(), ids=CANNOT_TELL)
def test_judge_that_cannot_tell_gives_no_win_rate_and_no_verdict(judge: Judged, reason: str) -> None:
    found = summary_of(comparison_of([0.0] * 40, [1.0] * 40, kl=[0.0] * 40), judge)
    assert not [name for name in found if name.startswith(("win_rate", "judge_score", "num_matched"))]
    assert found["kl"] == 0.0  # what does not depend on the judge is there
    verdict = decide(found, judge, GATE)
    assert (verdict.decision, verdict.reason) == ("reject", f"no verdict: {reason}")


def test_judge_that_answers_nine_tenths_can_tell() -> None:
    judge = pairwise_of([1.0] * 36 + [NAN] * 4)
    found = summary_of(comparison_of([0.0] * 40, [1.0] * 40), judge)
    assert judge.cannot_tell == ""
    assert [found[name] for name in ("win_rate", "num_compared", "num_unanswered")] == [1.0, 36, 4]
    assert decide(found, judge, GATE).decision == "promote"
    assert pairwise_of([1.0] * 35 + [NAN] * 5).cannot_tell.startswith("it answered only 88%")


def promotion_rate(wins: np.ndarray, groups: list[int], gate: GateConfig) -> float:
    """Share of simulated evaluations [N, R] that promote."""
    promoted = 0
    for seed, row in enumerate(wins):
        interval = bootstrap_mean(row, groups, Bootstrap(num_resamples=300, confidence=0.95, seed=seed))
        assert interval is not None
        found = interval.named("win_rate") | {"num_compared": len(set(groups)), "kl": 1.0}
        promoted += decide(found, JUDGE, gate).decision == "promote"
    return promoted / len(wins)


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("ties", [0.0, 0.5, 0.85, 0.95])
def test_equal_models_are_hardly_ever_promoted(num_samples: int, ties: float) -> None:
    """At the least number of prompts, 2.5 % would be exact. Rows of one prompt have a common lean to either model."""
    prompts = GateConfig().min_prompts
    rng = np.random.default_rng(int(100 * ties) + num_samples)
    lean = rng.choice([0.2, 0.8], size=(2000, prompts)) if num_samples > 1 else np.full((2000, prompts), 0.5)
    lean = lean.repeat(num_samples, axis=1)
    wins = (rng.random(lean.shape) < lean).astype(np.float64)
    wins[rng.random(lean.shape) < ties] = 0.5
    assert promotion_rate(wins, np.arange(prompts).repeat(num_samples).tolist(), GateConfig()) <= 0.04


def test_much_better_model_is_promoted() -> None:
    prompts = GateConfig().min_prompts
    wins = (np.random.default_rng(0).random((200, prompts)) < 0.8).astype(np.float64)
    assert promotion_rate(wins, list(range(prompts)), GateConfig()) > 0.9


# Rows that match.


def test_matching_rows_have_same_length_and_ending() -> None:
    c = comparison_of(
        [0.0] * 5,
        [0.0] * 5,
        sft_ends=[(3, False), (3, False), (3, True), (4, False), (8, True)],
        ppo_ends=[(3, False), (4, False), (3, False), (4, False), (8, True)],
    )
    assert matching_rows(c.sft.completions, c.policy.completions).tolist() == [0, 3, 4]


def test_no_matching_rows() -> None:
    c = comparison_of([0.0], [0.0], sft_ends=[(3, False)], ppo_ends=[(4, False)])
    assert matching_rows(c.sft.completions, c.policy.completions).tolist() == []


# The numbers.


def test_summarize() -> None:
    sft, ppo = [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 5.0]
    c = comparison_of(
        sft,
        ppo,
        kl=[0.5, 1.5, 2.5, 3.5],
        exact_kl=[1.0, 1.0, 2.0, 3.0],
        sft_ends=[(3, False), (5, False), (4, True), (4, True)],
        ppo_ends=[(3, False), (6, False), (4, True), (7, False)],
    )
    judge = judged_of(sft, ppo, cut_sft=[0.0, 1.0, 2.0, 3.0], cut_ppo=[1.0, 2.0, 2.0, 4.0])
    result = summary_of(c, judge)
    expected = {
        "num_prompts": 4,
        "num_samples": 1,
        "num_compared": 4,
        "num_unanswered": 0,
        "confidence": 0.95,
        "win_rate": (1 + 0.5 + 0 + 1) / 4,
        "num_matched": 2,  # the first and the third prompt
        "win_rate_matched": 0.5,
        "win_rate_cut": (1 + 1 + 0.5 + 1) / 4,
        "reward_win_rate": 0.625,
        "judge_accuracy": 0.811,
        "judge_accuracy_low": 0.75,
        "judge_accuracy_high": 0.86,
        "judge_accuracy_longer": 0.55,
        "kl": 2.0,
        "kl_exact": 1.75,
        "judge_score_sft": 1.5,
        "judge_score_ppo": 2.0,
        "reward_sft": 0.75,
        "reward_ppo": 1.0,
        "length_sft": 4.0,
        "length_ppo": 5.0,
        "eos_rate_sft": 0.5,
        "eos_rate_ppo": 0.75,
        "distinct2_sft": 5 / 8,  # "sft response" once, "response i" four times
        "distinct2_ppo": 5 / 8,
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    with_interval = ("win_rate", "win_rate_length_controlled", "win_rate_matched", "win_rate_cut", "kl", "kl_exact")
    for name in with_interval:
        assert result[f"{name}_low"] <= result[name] <= result[f"{name}_high"]
    assert set(result) == {*expected, *with_interval} | {f"{n}_{end}" for n in with_interval for end in ("low", "high")}


def test_accuracy_of_the_reward_model_is_there_if_it_was_measured() -> None:
    c, judge = both_of([0.0], [1.0])
    assert "reward_model_accuracy" not in summary_of(c, judge)
    assert summary_of(c, judge, reward_accuracy=0.722)["reward_model_accuracy"] == 0.722


def test_number_of_samples_and_confidence_are_those_of_the_config() -> None:
    c, judge = both_of([0.0, 1.0] * 8, [1.0, 0.0] * 8)
    config = EvaluationConfig(num_bootstrap=500, num_samples=3, confidence=0.5)
    narrow = summarize(c, [judge], config, reward_accuracy=None, seed=0)
    assert [narrow["num_samples"], narrow["confidence"]] == [3, 0.5]
    assert narrow["win_rate_low"] > summary_of(c, judge)["win_rate_low"]


def test_intervals_are_over_prompts() -> None:
    """Four equal rows per prompt give the intervals of one."""
    wins, gaps = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 1.0], [3, 3, 9, 3, 3, 8, 3]
    once = comparison_of([0.0] * 7, wins, kl=wins, ppo_ends=[(n, False) for n in gaps])
    rows = np.arange(7).repeat(4).tolist()
    often = comparison_of(
        [0.0] * 28,
        [wins[i] for i in rows],
        groups=rows,
        kl=[wins[i] for i in rows],
        ppo_ends=[(gaps[i], False) for i in rows],
    )
    a = summary_of(once, pairwise_of(wins))
    b = summary_of(often, pairwise_of([wins[i] for i in rows]))
    for name in ("win_rate", "kl", "win_rate_matched"):
        ends = ("", "_low", "_high")
        assert [a[name + end] for end in ends] == pytest.approx([b[name + end] for end in ends], abs=1e-12)
    assert b["num_prompts"] == b["num_compared"] == 7
    width_a, width_b = (
        n["win_rate_length_controlled_high"] - n["win_rate_length_controlled_low"] for n in (a, b)
    )  # the penalty of the slope weighs less with more rows
    assert width_b > 0.9 * width_a


def test_length_controlled_rate_uses_lengths_in_tokens() -> None:
    """PPO's responses win exactly where they are longer, which is mostly; at equal length, as often as not."""
    gaps = [12, 9, 6, 10, 8, 7, 11, 5, -6, -9] * 6
    wins = [float(gap > 0) for gap in gaps]
    c = comparison_of([0.0] * 60, wins, sft_ends=[(20, False)] * 60, ppo_ends=[(20 + gap, False) for gap in gaps])
    found = summary_of(c, pairwise_of(wins))
    assert found["win_rate"] == pytest.approx(0.8)
    assert found["win_rate_length_controlled"] == pytest.approx(0.5, abs=0.2)
    swapped = comparison_of([0.0] * 60, wins, sft_ends=[(20 + gap, False) for gap in gaps], ppo_ends=[(20, False)] * 60)
    assert summary_of(swapped, pairwise_of(wins))["win_rate_length_controlled"] == pytest.approx(
        found["win_rate_length_controlled"]
    )  # a + b tanh(-gap / std) has the same a


def test_summarize_all_wins() -> None:
    c, judge = both_of([0.0] * 30, [1.0] * 30)
    result = summary_of(c, judge)
    for name in ("win_rate", "win_rate_matched", "win_rate_cut"):
        assert [result[name], result[f"{name}_low"], result[f"{name}_high"]] == [1.0, 1.0, 1.0]
    assert 0.9 < result["win_rate_length_controlled_low"] <= result["win_rate_length_controlled"] < 1
    assert decide(result, judge, GATE).decision == "promote"


def test_model_compared_with_itself_is_all_ties_and_rejected() -> None:
    scores = [0.3, -1.0, 2.0] * 10
    c, judge = both_of(scores, scores, kl=[0.0] * 30, exact_kl=[0.0] * 30)
    result = summary_of(c, judge)
    for name in ("win_rate", "win_rate_length_controlled", "win_rate_matched", "win_rate_cut"):
        assert [result[name], result[f"{name}_low"], result[f"{name}_high"]] == pytest.approx([0.5] * 3, abs=1e-9)
    verdict = decide(result, judge, GATE)
    assert verdict.decision == "reject"
    assert verdict.reason.startswith("win rate 0.500")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_all_numbers_are_finite_without_matching_rows(size: int) -> None:
    """Without matching responses, the matched win rate is unknown, and missing."""
    c, judge = both_of(
        [0.0] * size, [1.0] * size, sft_ends=[(3, False)] * size, ppo_ends=[(4, True)] * size, kl=[0.0] * size
    )
    result = summary_of(c, judge)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in result.values()), result
    assert result["num_matched"] == 0
    assert not [name for name in result if name.startswith("win_rate_matched")]


def test_summarize_is_reproducible_by_seed() -> None:
    c, judge = both_of([0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.5])
    assert summary_of(c, judge, seed=1) == summary_of(c, judge, seed=1)


# Several judges.

WINS = [1.0, 1.0, 0.0, NAN, 0.5, 1.0, 0.0, 1.0, 1.0, 1.0]
CONSISTENT = [True, True, True, False, False, True, True, False, True, True]


def test_first_judge_has_no_prefix_and_the_others_have_their_names() -> None:
    c = comparison_of([0.0] * 10, [1.0] * 10)
    counts = {"requests": 20.0, "cost": 0.25}
    first = pairwise_of(WINS, consistent=CONSISTENT, counts=counts, name="gpt")
    second = judged_of([0.0] * 10, [1.0] * 9 + [-1.0], name="people", agreement=replace(GOOD, accuracy=0.7))
    result = summary_of(c, first, second)
    expected = {
        "win_rate": 6.5 / 9,
        "win_rate_matched": 6.5 / 9,
        "num_compared": 9,
        "num_unanswered": 1,
        "judge_consistency": 7 / 9,  # of the answered ones
        "judge_requests": 20.0,
        "judge_cost": 0.25,
        "judge_accuracy": 0.811,
        "judges/people/win_rate": 0.9,
        "judges/people/win_rate_cut": 0.9,
        "judges/people/num_compared": 10,
        "judges/people/num_unanswered": 0,
        "judges/people/judge_accuracy": 0.7,
        "judges/people/judge_score_sft": 0.0,
        "judges/people/judge_score_ppo": 0.8,
    }
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    absent = (
        "judge_score_sft",
        "win_rate_cut",
        "judges/people/judge_consistency",
        "judges/people/kl",
        "judges/gpt/win_rate",
    )
    assert not [name for name in absent if name in result]


def test_second_judge_does_not_change_the_numbers_of_the_first() -> None:
    c = comparison_of([0.0] * 10, [1.0] * 10)
    first = pairwise_of(WINS, consistent=CONSISTENT)
    alone = summary_of(c, first)
    for second in (
        judged_of([0.0] * 10, [1.0] * 10, name="b"),
        pairwise_of([NAN] * 10, name="b", error="it is down"),
        judged_of([0.0] * 10, [1.0] * 10, name="b", agreement=CHANCE),
    ):
        both = summary_of(c, first, second)
        assert {name: both[name] for name in alone} == alone
        assert all(name.startswith(("judges/b/", "kappa/gpt/b")) for name in both.keys() - alone.keys())
        assert both["judges/b/num_compared"] == (0 if second.error else 10)
        assert ("judges/b/win_rate" in both) == (second.cannot_tell == "")


def test_first_judge_decides() -> None:
    c = comparison_of([0.0] * 40, [1.0] * 40)
    wins, losses = judged_of([0.0] * 40, [1.0] * 40, name="a"), judged_of([0.0] * 40, [-1.0] * 40, name="b")
    assert decide(summary_of(c, wins, losses), wins, GATE).decision == "promote"
    assert decide(summary_of(c, losses, wins), losses, GATE).decision == "reject"
    chance = judged_of([0.0] * 40, [1.0] * 40, name="c", agreement=CHANCE)
    assert decide(summary_of(c, chance, wins), chance, GATE).reason.startswith("no verdict: the judge c cannot tell")
    assert decide(summary_of(c, wins, chance), wins, GATE).decision == "promote"


def test_kappa_of_each_two_judges() -> None:
    """The judges a and b agree on 3 of 4 rows, by chance on (3 * 2 + 1 * 2) / 16 = 1/2: kappa (3/4 - 1/2) / (1/2)."""
    c = comparison_of([0.0] * 4, [1.0] * 4)
    a = pairwise_of([1.0, 1.0, 1.0, 0.0], name="a")
    b = pairwise_of([1.0, 1.0, 0.0, 0.0], name="b")
    opposite = pairwise_of([0.0, 0.0, 0.0, 1.0], name="opposite")
    down = pairwise_of([NAN] * 4, name="down", error="it is down")
    result = summary_of(c, a, b, opposite, down)
    assert {name: value for name, value in result.items() if name.startswith("kappa/")} == pytest.approx(
        {"kappa/a/b": 0.5, "kappa/a/opposite": -0.6, "kappa/b/opposite": -0.5}
    )  # a and opposite: by chance (3 * 1 + 1 * 3) / 16 = 3/8, -3/8 / (5/8); b and opposite: 1/4 and 1/2


def test_kappa_that_is_undefined_is_missing() -> None:
    c = comparison_of([0.0] * 2, [1.0] * 2)
    result = summary_of(c, pairwise_of([1.0, 1.0], name="a"), pairwise_of([1.0, 1.0], name="b"))
    assert not [name for name in result if name.startswith("kappa/")]
