import math

import pytest

from components.evaluation.verdict import decide, matching_rows, summarise
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from tests.support.comparisons import comparison_of

SETTINGS = EvaluationConfig(num_bootstrap=500)
GATE = GateConfig(min_win_rate=0.5, max_kl=10.0)


def numbers(low: float, kl: float) -> dict[str, float]:
    return {"win_rate": 0.7, "win_rate_low": low, "win_rate_high": 0.9, "kl": kl}


class TestDecide:
    @pytest.mark.parametrize(
        ("low", "kl", "decision"),
        [
            (0.501, 0.0, "promote"),
            (0.501, 10.0, "promote"),  # within means up to
            (0.501, 10.001, "reject"),
            (0.5, 0.0, "reject"),  # above means above
            (0.499, 0.0, "reject"),
            (0.499, 11.0, "reject"),
            (math.nan, 0.0, "reject"),
            (0.9, math.nan, "reject"),
            (0.9, -0.2, "promote"),  # an estimate of a KL of nearly 0 may be negative
        ],
    )
    def test_at_the_borders(self, low: float, kl: float, decision: str) -> None:
        assert decide(numbers(low, kl), GATE).decision == decision

    def test_the_reason_says_which_numbers(self) -> None:
        promoted = decide(numbers(0.6, 2.5), GATE).reason
        assert promoted == "win rate 0.700 [0.600, 0.900] lies above 0.5, and KL 2.50 is within 10"
        rejected = decide(numbers(0.4, 12.5), GateConfig(min_win_rate=0.55, max_kl=10.0)).reason
        assert rejected == (
            "win rate 0.700 [0.400, 0.900]: its lower end is not above 0.55; KL 12.50 nats per response is above 10"
        )

    def test_the_gate_is_the_settings(self) -> None:
        assert decide(numbers(0.6, 2.0), GateConfig(min_win_rate=0.65)).decision == "reject"
        assert decide(numbers(0.1, 2.0), GateConfig(min_win_rate=0.0)).decision == "promote"
        assert decide(numbers(0.6, 2.0), GateConfig(max_kl=1.0)).decision == "reject"


class TestMatchingRows:
    def test_need_the_same_length_and_the_same_ending(self) -> None:
        c = comparison_of(
            [0.0] * 5,
            [0.0] * 5,
            sft_ends=[(3, False), (3, False), (3, True), (4, False), (8, True)],
            ppo_ends=[(3, False), (4, False), (3, False), (4, False), (8, True)],
        )
        assert matching_rows(c.sft.completions, c.ppo.completions).tolist() == [0, 3, 4]

    def test_there_may_be_none(self) -> None:
        c = comparison_of([0.0], [0.0], sft_ends=[(3, False)], ppo_ends=[(4, False)])
        assert matching_rows(c.sft.completions, c.ppo.completions).tolist() == []


class TestSummarise:
    def test_by_hand(self) -> None:
        c = comparison_of(
            [0.0, 1.0, 2.0, 3.0],
            [1.0, 1.0, 1.0, 5.0],
            kl=[0.5, 1.5, 2.5, 3.5],
            cut_sft=[0.0, 1.0, 2.0, 3.0],
            cut_ppo=[1.0, 2.0, 2.0, 4.0],
            sft_ends=[(3, False), (5, False), (4, True), (4, True)],
            ppo_ends=[(3, False), (6, False), (4, True), (7, False)],
        )
        found = summarise(c, SETTINGS, accuracy={"judge": 0.75}, seed=0)
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
            "distinct2_sft": 5 / 8,  # "sft says" once, "says i" four times
            "distinct2_ppo": 5 / 8,
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected)
        assert found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"]
        assert found["win_rate_cut_low"] <= 0.875 <= found["win_rate_cut_high"]
        assert found["kl_low"] <= 2.0 <= found["kl_high"]
        assert "reward_model_accuracy" not in found  # it was not measured, and no number stands in for it

    def test_all_wins(self) -> None:
        found = summarise(comparison_of([0.0] * 9, [1.0] * 9), SETTINGS, accuracy={}, seed=0)
        for name in ("win_rate", "win_rate_matched"):
            assert [found[name], found[f"{name}_low"], found[f"{name}_high"]] == [1.0, 1.0, 1.0]
        assert decide(found, GATE).decision == "promote"

    def test_against_itself_it_is_all_ties_and_never_promoted(self) -> None:
        scores = [0.3, -1.0, 2.0]
        found = summarise(comparison_of(scores, scores, kl=[0.0] * 3), SETTINGS, accuracy={}, seed=0)
        assert [found["win_rate"], found["win_rate_low"], found["win_rate_high"]] == [0.5, 0.5, 0.5]
        assert decide(found, GATE).decision == "reject"

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_nothing_is_missing_or_undefined(self, size: int) -> None:
        """Also where no two answers match: then nothing is known of the matched win rate."""
        c = comparison_of(
            [0.0] * size, [1.0] * size, sft_ends=[(3, False)] * size, ppo_ends=[(4, True)] * size, kl=[0.0] * size
        )
        found = summarise(c, SETTINGS, accuracy={}, seed=0)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in found.values()), found
        assert found["num_matched"] == 0
        assert [found[f"win_rate_matched{end}"] for end in ("", "_low", "_high")] == [0.5, 0.0, 1.0]

    def test_follows_from_its_seed(self) -> None:
        c = comparison_of([0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.5])
        assert summarise(c, SETTINGS, accuracy={}, seed=1) == summarise(c, SETTINGS, accuracy={}, seed=1)
