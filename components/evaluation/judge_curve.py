"""How training looked to the judge: its score of each look at the validation prompts, beside the reward model's."""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from components.rlhf.data.records import Completion, Prompt, ValidationSample
from components.rlhf.rewards.protocol import Scorer


def judge_curve(samples: Sequence[ValidationSample], judge: Scorer) -> list[dict[str, float]]:
    """One row of means a look, in the order of the iterations.

    PPO saw the reward model's score and never the judge's: where the first rises and the second does not, it has learned to
    please the reward model (Gao et al. 2022).
    """
    rows = []
    for iteration, group in groupby(sorted(samples, key=lambda s: s.iteration), key=lambda s: s.iteration):
        look = list(group)
        rows.append(
            {
                "iteration": float(iteration),
                "num_rollouts": float(look[0].num_rollouts),
                "reward": fmean(s.score for s in look),
                "judge_score": float(judge.score([_as_completion(s) for s in look]).mean()),
                "kl": fmean(s.kl for s in look),
                "length": fmean(s.num_tokens for s in look),
                "eos_rate": fmean(not s.truncated for s in look),
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
