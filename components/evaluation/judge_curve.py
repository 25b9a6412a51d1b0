"""Judge and reward model scores over PPO's validation passes."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from components.evaluation.judging import Judged, as_completion
from components.rlhf.data.records import ValidationSample


def judge_curve(samples: Sequence[ValidationSample], judges: Sequence[Judged]) -> list[dict[str, float]]:
    """One row of means per validation pass, in the order of the iterations.

    PPO optimizes the reward model's score and never sees the judge's: if only the first rises, it over-optimizes the reward
    model (Gao et al. 2022). judge_score is that of the first judge that gives scores and can tell; without one it is missing.
    Responses whose environment failed do not count.
    """
    scores = next((j.validation_scores for j in judges if j.validation_scores is not None and not j.cannot_tell), None)
    passes: dict[int, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        if sample.failure:
            continue
        passes[sample.iteration].append(number)
    rows = []
    for iteration, numbers in sorted(passes.items()):
        validation_pass = [samples[i] for i in numbers]
        rows.append(
            {
                "iteration": float(iteration),
                "num_rollouts": float(validation_pass[0].num_rollouts),
                "reward": fmean(s.score for s in validation_pass),
                **({} if scores is None else {"judge_score": fmean(scores[i] for i in numbers)}),
                "kl": fmean(s.kl for s in validation_pass),
                "length": fmean(as_completion(s).num_model_tokens for s in validation_pass),
                "eos_rate": fmean(not s.truncated for s in validation_pass),
            }
        )
    return rows
