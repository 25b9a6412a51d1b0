"""Judges that verify answers: pass@1 and its intervals, the gate without agreement, and reports of runs without a reward model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from components.evaluation.compare import Comparison
from components.evaluation.judge_curve import judge_curve
from components.evaluation.judging import Judged
from components.evaluation.report import as_html, as_markdown
from components.evaluation.samples import save_comparison
from components.evaluation.statistics import Bootstrap, pass_rate, wilson_interval
from components.evaluation.verdict import decide, summarize
from components.judge.panel import BuiltJudge, measure_judge
from components.judge.summary import as_markdown as judges_as_markdown
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.config.judge import ExactMatchJudge
from components.rlhf.rewards.judges import JudgeEntry, read_judges, save_judges
from components.rlhf.rewards.protocol import Preferences
from tests.support.comparisons import comparison_of, judged_of

CONFIG, GATE = EvaluationConfig(num_bootstrap=200), GateConfig(min_win_rate=0.5, max_kl=10.0, min_prompts=30)
ENTRY = JudgeEntry(settings=ExactMatchJudge(kind="exact_match"), agreement=None)
SFT, PPO = [1.0] * 10 + [0.0] * 30, [1.0] * 25 + [0.0] * 15


def verifying(sft: list[float], ppo: list[float]) -> Judged:
    return judged_of(sft, ppo, entry=ENTRY, cut_wins=None)


def without_rewards(comparison: Comparison) -> Comparison:
    return replace(
        comparison, sft=replace(comparison.sft, rewards=None), policy=replace(comparison.policy, rewards=None)
    )


def numbers_of(sft: list[float], ppo: list[float], **options: Any) -> dict[str, float]:
    comparison = without_rewards(comparison_of(sft, ppo, **options))
    return summarize(comparison, [verifying(sft, ppo)], CONFIG, reward_accuracy=None, seed=0)


def test_pass_at_1_of_both_models_and_their_difference() -> None:
    found = numbers_of(SFT, PPO)
    assert (found["pass_at_1_sft"], found["pass_at_1_ppo"], found["pass_at_1_gain"]) == (0.25, 0.625, 0.375)
    # Wilson's interval of 10 of 40, by hand: (0.25 + 1.92073/40 +- 1.95996 sqrt(0.25 * 0.75/40 + 3.84146/6400)) / (1 + 3.84146/40)
    assert found["pass_at_1_sft_low"] == pytest.approx(0.14187, abs=1e-4)
    assert found["pass_at_1_sft_high"] == pytest.approx(0.40194, abs=1e-4)
    assert 0.2 < found["pass_at_1_gain_low"] < 0.375 < found["pass_at_1_gain_high"] < 0.58
    assert found["win_rate"] == 0.5 + 0.375 / 2  # a right response beats a wrong one, and two of a kind are a tie


def test_difference_is_that_of_the_same_prompts() -> None:
    """Of two models that pass the same prompts the difference is 0, without an interval around it."""
    found = numbers_of(SFT, SFT)
    assert [found[f"pass_at_1_gain{end}"] for end in ("", "_low", "_high")] == [0.0, 0.0, 0.0]


@given(st.integers(1, 200), st.data())
def test_wilson_interval_is_that_of_scipy(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(0.9, method="wilson")
    found = wilson_interval(float(successes), trials, confidence=0.9)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_several_samples_per_prompt_are_not_independent() -> None:
    """Four equal samples of each of 10 prompts say no more than one: the interval is over prompts."""
    bootstrap = Bootstrap(num_resamples=2000, confidence=0.95, seed=0)
    passed = np.repeat(np.array([1.0] * 5 + [0.0] * 5), 4)
    grouped = pass_rate(passed, [row // 4 for row in range(40)], bootstrap)
    alone = pass_rate(passed, list(range(40)), bootstrap)
    assert grouped.value == alone.value == 0.5
    assert grouped.high - grouped.low > 1.6 * (alone.high - alone.low)  # sqrt(4) in the limit


def test_score_above_one_passes_and_half_does_not() -> None:
    found = numbers_of([0.5] * 40, [2.0] * 40)
    assert (found["pass_at_1_sft"], found["pass_at_1_ppo"]) == (0.0, 1.0)
    assert found["pass_at_1_sft_high"] > 0.05  # none of 40 is no proof of 0


def test_other_judges_have_no_pass_at_1() -> None:
    found = summarize(comparison_of(SFT, PPO), [judged_of(SFT, PPO)], CONFIG, reward_accuracy=None, seed=0)
    assert not [name for name in found if "pass_at_1" in name]


def test_second_judge_has_its_own_name() -> None:
    judges = [judged_of(SFT, PPO), verifying(SFT, PPO)]
    found = summarize(comparison_of(SFT, PPO), judges, CONFIG, reward_accuracy=None, seed=0)
    assert found["judges/exact_match/pass_at_1_ppo"] == 0.625
    assert "pass@1 (exact_match)" in as_markdown(found, judges, decide(found, judges[0], GATE))


# --- the gate ---


def test_gate_needs_no_agreement_with_people() -> None:
    verdict = decide(numbers_of(SFT, PPO), verifying(SFT, PPO), GATE)
    assert verdict.decision == "promote"
    assert "(pass@1 0.250 to 0.625)" in verdict.reason
    assert decide(numbers_of(PPO, SFT), verifying(PPO, SFT), GATE).decision == "reject"


# --- a run without a reward model ---


def test_nothing_speaks_of_a_reward_model_that_is_not_there(tmp_path: Path) -> None:
    comparison, judge = without_rewards(comparison_of(SFT, PPO)), verifying(SFT, PPO)
    found = summarize(comparison, [judge], CONFIG, reward_accuracy=None, seed=0)
    verdict = decide(found, judge, GATE)
    assert not [name for name in found if name.startswith("reward")]
    page = as_html(comparison, [judge], found, verdict, judge_curve([], [judge]), seed=0)
    text = as_markdown(found, [judge], verdict)
    for shown in (page, text):
        assert "reward model" not in shown
        assert "pass@1" in shown and "0.250 [0.142, 0.402]" in shown and "0.625 [" in shown
        assert "needs none" in shown
    save_comparison(comparison, [judge], found, [], tmp_path)
    row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert "reward" not in row["sft"] and row["sft"]["judge_score"] == 1.0


# --- the stage judge ---


class NoJudge:
    def compare(self, first: Any, second: Any) -> Preferences:
        raise AssertionError("pairs have no right answer")


def test_judge_that_verifies_is_not_measured_on_pairs_and_can_tell(tmp_path: Path) -> None:
    measured = measure_judge(ENTRY.settings, BuiltJudge(pairwise=NoJudge()), [], lambda *_: None, seed=0)  # type: ignore[arg-type,return-value]
    assert measured.entry == ENTRY and measured.entry.cannot_tell == ""
    assert measured.describe() == "judge exact_match verifies answers, and needs no agreement with people"
    assert "| exact_match | verifies answers |" in judges_as_markdown([measured])
    save_judges(tmp_path, [measured.entry])
    assert read_judges(tmp_path) == [ENTRY]
