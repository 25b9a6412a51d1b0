from dataclasses import replace

import pytest

from components.evaluation.judge_curve import OverOptimization, judge_curve, over_optimization
from components.rlhf.data.records import Prompt, ValidationSample
from tests.support.comparisons import CHANCE, judged_of, pairwise_of


def sample(
    iteration: int, response: str, *, score: float, kl: float, num_tokens: int, truncated: bool
) -> ValidationSample:
    return ValidationSample(
        iteration=iteration,
        num_rollouts=10 * iteration,
        prompt=Prompt(prompt="It", id="validation-0"),
        prompt_ids=[5],
        response_ids=[2] * num_tokens,
        response=response,
        truncated=truncated,
        score=score,
        kl=kl,
    )


SAMPLES = [
    sample(0, " is", score=0.0, kl=0.0, num_tokens=2, truncated=False),
    sample(4, " was so", score=1.0, kl=2.0, num_tokens=4, truncated=True),
    sample(0, " was", score=-1.0, kl=0.0, num_tokens=4, truncated=True),
    sample(4, " is so", score=2.0, kl=1.0, num_tokens=4, truncated=True),
]
# The rewards of iteration 0 have a mean of -0.5 and a standard deviation of 0.5, those of the judge 5.5 and 0.5.
ROWS = [
    {
        "iteration": 0, "num_rollouts": 0, "reward": -0.5, "judge_score": 5.5, "kl": 0, "length": 3, "eos_rate": 0.5,
        "reward_gain": 0, "judge_gain": 0,
    },
    {
        "iteration": 4, "num_rollouts": 40, "reward": 1.5, "judge_score": 8.5, "kl": 1.5, "length": 4, "eos_rate": 0,
        "reward_gain": 4, "judge_gain": 6,
    },
]  # fmt: skip
SCORES = [5.0, 9.0, 6.0, 8.0]  # of the four samples
JUDGE = judged_of([0.0], [1.0], validation_scores=SCORES)


def test_one_row_per_validation_pass() -> None:
    assert judge_curve(SAMPLES, [JUDGE]) == ROWS


def test_scores_are_those_of_the_first_judge_that_has_some_and_can_tell() -> None:
    chance = judged_of([0.0], [1.0], name="chance", agreement=CHANCE, validation_scores=[99.0] * 4)
    later = judged_of([0.0], [1.0], name="later", validation_scores=[-99.0] * 4)
    assert judge_curve(SAMPLES, [pairwise_of([1.0]), chance, JUDGE, later]) == ROWS


def test_without_scores_there_is_no_judge_score() -> None:
    chance = judged_of([0.0], [1.0], name="chance", agreement=CHANCE, validation_scores=SCORES)
    without = [
        {name: value for name, value in row.items() if name not in ("judge_score", "judge_gain")} for row in ROWS
    ]
    assert judge_curve(SAMPLES, [pairwise_of([1.0]), chance]) == without


def test_no_samples_give_no_rows() -> None:
    assert judge_curve([], [judged_of([0.0], [1.0], validation_scores=[])]) == []


# Over-optimization.


def passes(*scores: list[float]) -> list[dict[str, float]]:
    """Validation passes on two prompts with these scores of the judge, in which the reward always rises."""
    samples, given = [], []
    for number, pair in enumerate(scores):
        for prompt, score in enumerate(pair):
            one = sample(4 * number, "", score=float(number), kl=float(number), num_tokens=1, truncated=False)
            samples.append(replace(one, prompt=Prompt(prompt="It", id=f"validation-{prompt}")))
            given.append(score)
    return judge_curve(samples, [judged_of([0.0], [1.0], validation_scores=given)])


def test_fall_of_the_judge_is_measured_on_the_same_prompts() -> None:
    rows = passes([0.0, 1.0], [4.0, 6.0], [3.0, 3.0])
    assert "judge_fall" not in rows[0] and "judge_fall" not in rows[1]
    # The prompts fall by 1 and 3: 2 on average, with a standard deviation of sqrt(2) and a standard error of 1.
    assert (rows[2]["judge_fall"], rows[2]["judge_fall_se"]) == (2.0, pytest.approx(1.0))


def test_passes_after_the_best_one_of_the_judge_are_over_optimized() -> None:
    rows = passes([0.0, 1.0], [4.0, 6.0], [3.0, 5.1], [4.0, 5.0], [1.0, 2.9])
    found = over_optimization(rows)
    assert found is not None
    assert found.best == rows[1] and list(found.later) == rows[2:]
    assert found.worst == rows[4] and found.kl == (1.0, 4.0)
    assert found.is_clear  # the fall is 3.05, its standard error 0.05


def test_fall_must_be_larger_the_more_passes_it_is_chosen_from() -> None:
    """Bonferroni over the pairs of passes: the normal quantiles of 1 - 0.025 / 1 and of 1 - 0.025 / 10."""
    two, five = (OverOptimization(best={}, later=[], num_passes=number).threshold for number in (2, 5))
    assert (two, five) == (pytest.approx(1.95996, abs=1e-5), pytest.approx(2.80703, abs=1e-5))


def test_fall_within_noise_is_not_clear() -> None:
    found = over_optimization(passes([0.0, 1.0], [4.0, 6.0], [5.0, 4.0]))  # the prompts fall by -1 and 2
    assert found is not None and not found.is_clear


@pytest.mark.parametrize(
    "rows",
    [
        [],
        passes([0.0, 1.0]),
        passes([0.0, 1.0], [4.0, 6.0]),  # the last pass is the best one
        [{name: v for name, v in row.items() if name != "judge_score"} for row in passes([4.0, 5.0], [0.0, 1.0])],
        [row | {"reward": 0.0} for row in passes([4.0, 5.0], [0.0, 1.0])],  # the reward falls, too
    ],
)
def test_nothing_is_over_optimized(rows: list[dict[str, float]]) -> None:
    assert over_optimization(rows) is None


def test_gains_need_a_first_pass_whose_scores_differ() -> None:
    rows = passes([1.0, 1.0], [4.0, 6.0])
    assert "judge_gain" not in rows[0] and "judge_gain" not in rows[1]
    (later,) = judge_curve(SAMPLES[1:2], [])
    assert "reward_gain" not in later
