import math

import pytest

from components.evaluation.verdict import decide, matching_rows, summarize
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from tests.support.comparisons import comparison_of

CONFIG = EvaluationConfig(num_bootstrap=500)
GATE = GateConfig(min_win_rate=0.5, max_kl=10.0)


def numbers(low: float, kl: float) -> dict[str, float]:
    return {"win_rate": 0.7, "win_rate_low": low, "win_rate_high": 0.9, "kl": kl}


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
        (0.9, -0.2, "promote"),  # an estimate of a KL of nearly 0 may be negative
    ],
)
def test_decision_at_the_thresholds(low: float, kl: float, decision: str) -> None:
    assert decide(numbers(low, kl), GATE).decision == decision


def test_reason_states_the_numbers() -> None:
    promoted = decide(numbers(0.6, 2.5), GATE).reason
    assert promoted == "win rate 0.700 [0.600, 0.900] is above 0.5, and KL 2.50 is at most 10"
    rejected = decide(numbers(0.4, 12.5), GateConfig(min_win_rate=0.55, max_kl=10.0)).reason
    assert rejected == (
        "win rate 0.700 [0.400, 0.900]: lower end of the interval is not above 0.55; KL 12.50 nats per response is above 10"
    )


def test_decision_uses_gate_config() -> None:
    assert decide(numbers(0.6, 2.0), GateConfig(min_win_rate=0.65)).decision == "reject"
    assert decide(numbers(0.1, 2.0), GateConfig(min_win_rate=0.0)).decision == "promote"
    assert decide(numbers(0.6, 2.0), GateConfig(max_kl=1.0)).decision == "reject"


def test_matching_rows_have_same_length_and_ending() -> None:
    c = comparison_of(
        [0.0] * 5,
        [0.0] * 5,
        sft_ends=[(3, False), (3, False), (3, True), (4, False), (8, True)],
        ppo_ends=[(3, False), (4, False), (3, False), (4, False), (8, True)],
    )
    assert matching_rows(c.sft.completions, c.ppo.completions).tolist() == [0, 3, 4]


def test_no_matching_rows() -> None:
    c = comparison_of([0.0], [0.0], sft_ends=[(3, False)], ppo_ends=[(4, False)])
    assert matching_rows(c.sft.completions, c.ppo.completions).tolist() == []


def test_summarize() -> None:
    c = comparison_of(
        [0.0, 1.0, 2.0, 3.0],
        [1.0, 1.0, 1.0, 5.0],
        kl=[0.5, 1.5, 2.5, 3.5],
        cut_sft=[0.0, 1.0, 2.0, 3.0],
        cut_ppo=[1.0, 2.0, 2.0, 4.0],
        sft_ends=[(3, False), (5, False), (4, True), (4, True)],
        ppo_ends=[(3, False), (6, False), (4, True), (7, False)],
    )
    result = summarize(c, CONFIG, accuracy={"judge": 0.75}, seed=0)
    expected = {
        "num_prompts": 4,
        "win_rate": (1 + 0.5 + 0 + 1) / 4,
        "num_matched": 2,  # the first and the third prompt
        "win_rate_matched": 0.5,
        "win_rate_cut": (1 + 1 + 0.5 + 1) / 4,
        "reward_win_rate": 0.625,
        "judge_accuracy": 0.75,
        "kl": 2.0,
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
    assert result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"]
    assert result["win_rate_cut_low"] <= 0.875 <= result["win_rate_cut_high"]
    assert result["kl_low"] <= 2.0 <= result["kl_high"]
    assert "reward_model_accuracy" not in result  # absent if not measured


def test_summarize_all_wins() -> None:
    result = summarize(comparison_of([0.0] * 9, [1.0] * 9), CONFIG, accuracy={}, seed=0)
    for name in ("win_rate", "win_rate_matched"):
        assert [result[name], result[f"{name}_low"], result[f"{name}_high"]] == [1.0, 1.0, 1.0]
    assert decide(result, GATE).decision == "promote"


def test_model_compared_with_itself_is_all_ties_and_rejected() -> None:
    scores = [0.3, -1.0, 2.0]
    result = summarize(comparison_of(scores, scores, kl=[0.0] * 3), CONFIG, accuracy={}, seed=0)
    assert [result["win_rate"], result["win_rate_low"], result["win_rate_high"]] == [0.5, 0.5, 0.5]
    assert decide(result, GATE).decision == "reject"


@pytest.mark.parametrize("size", [1, 2, 7])
def test_all_numbers_are_finite_without_matching_rows(size: int) -> None:
    """Without matching responses, the matched win rate is unknown."""
    c = comparison_of(
        [0.0] * size, [1.0] * size, sft_ends=[(3, False)] * size, ppo_ends=[(4, True)] * size, kl=[0.0] * size
    )
    result = summarize(c, CONFIG, accuracy={}, seed=0)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in result.values()), result
    assert result["num_matched"] == 0
    assert [result[f"win_rate_matched{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]


def test_summarize_is_reproducible_by_seed() -> None:
    c = comparison_of([0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.5])
    assert summarize(c, CONFIG, accuracy={}, seed=1) == summarize(c, CONFIG, accuracy={}, seed=1)
