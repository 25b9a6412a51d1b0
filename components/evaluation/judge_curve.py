"""Judge and reward model scores over PPO's validation passes."""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from components.rlhf.data.records import Completion, Prompt, ValidationSample
from components.rlhf.rewards.protocol import Scorer


def judge_curve(samples: Sequence[ValidationSample], judge: Scorer) -> list[dict[str, float]]:
    """One row of means per validation pass, in the order of the iterations.

    PPO optimizes the reward model's score and never sees the judge's: if only the first rises, it over-optimizes the reward
    model (Gao et al. 2022).
    """
    rows = []
    for iteration, group in groupby(sorted(samples, key=lambda s: s.iteration), key=lambda s: s.iteration):
        validation_pass = list(group)
        rows.append(
            {
                "iteration": float(iteration),
                "num_rollouts": float(validation_pass[0].num_rollouts),
                "reward": fmean(s.score for s in validation_pass),
                "judge_score": float(judge.score([_as_completion(s) for s in validation_pass]).mean()),
                "kl": fmean(s.kl for s in validation_pass),
                "length": fmean(s.num_tokens for s in validation_pass),
                "eos_rate": fmean(not s.truncated for s in validation_pass),
            }
        )
    return rows


def _as_completion(sample: ValidationSample) -> Completion:
    return Completion(
        prompt=Prompt(prompt=sample.prompt),
        prompt_ids=[],
        response_ids=[],
        response=sample.response,
        logprobs=None,
        truncated=sample.truncated,
    )
