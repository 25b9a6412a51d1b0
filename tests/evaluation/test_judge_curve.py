from components.evaluation.judge_curve import judge_curve
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
ROWS = [
    {"iteration": 0, "num_rollouts": 0, "reward": -0.5, "judge_score": 5.5, "kl": 0, "length": 3, "eos_rate": 0.5},
    {"iteration": 4, "num_rollouts": 40, "reward": 1.5, "judge_score": 8.5, "kl": 1.5, "length": 4, "eos_rate": 0},
]
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
    without = [{name: value for name, value in row.items() if name != "judge_score"} for row in ROWS]
    assert judge_curve(SAMPLES, [pairwise_of([1.0]), chance]) == without


def test_no_samples_give_no_rows() -> None:
    assert judge_curve([], [judged_of([0.0], [1.0], validation_scores=[])]) == []
