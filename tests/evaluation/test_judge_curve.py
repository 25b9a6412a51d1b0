from collections.abc import Sequence

import torch

from components.evaluation.judge_curve import judge_curve
from components.rlhf.data.records import Completion, ValidationSample


class LengthJudge:
    """Scores a text by its length in characters."""

    def score(self, completions: Sequence[Completion]) -> torch.Tensor:
        return torch.tensor([float(len(c.prompt.prompt + c.response)) for c in completions])


def sample(
    iteration: int, response: str, *, score: float, kl: float, num_tokens: int, truncated: bool
) -> ValidationSample:
    return ValidationSample(
        iteration=iteration,
        num_rollouts=10 * iteration,
        prompt="It",
        response=response,
        num_tokens=num_tokens,
        truncated=truncated,
        score=score,
        kl=kl,
    )


def test_one_row_per_validation_pass() -> None:
    samples = [
        sample(0, " is", score=0.0, kl=0.0, num_tokens=2, truncated=False),
        sample(4, " was so", score=1.0, kl=2.0, num_tokens=4, truncated=True),
        sample(0, " was", score=-1.0, kl=0.0, num_tokens=4, truncated=True),
        sample(4, " is so", score=2.0, kl=1.0, num_tokens=4, truncated=True),
    ]
    assert judge_curve(samples, LengthJudge()) == [
        {"iteration": 0, "num_rollouts": 0, "reward": -0.5, "judge_score": 5.5, "kl": 0, "length": 3, "eos_rate": 0.5},
        {"iteration": 4, "num_rollouts": 40, "reward": 1.5, "judge_score": 8.5, "kl": 1.5, "length": 4, "eos_rate": 0},
    ]


def test_no_samples_give_no_rows() -> None:
    assert judge_curve([], LengthJudge()) == []
