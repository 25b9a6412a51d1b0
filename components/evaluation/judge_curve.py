"""Judge and reward model scores over PPO's validation passes, and where PPO over-optimizes its reward."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist, fmean, pstdev, stdev

from components.evaluation.judging import Judged, as_completion
from components.rlhf.data.records import ValidationSample

MISTAKES = 0.025  # how often a fall counts as more than noise in a run without one


def judge_curve(samples: Sequence[ValidationSample], judges: Sequence[Judged]) -> list[dict[str, float]]:
    """One row of means per validation pass, in the order of the iterations.

    PPO optimizes the reward model's score and never sees the judge's: if only the first rises, it over-optimizes the reward
    model (Gao et al. 2022). judge_score is that of the first judge that gives scores and can tell; without one it is missing.
    reward_gain and judge_gain are the rises since iteration 0 in standard deviations of the scores there. judge_fall is how much lower the
    judge's score is than in its best pass, if that was earlier, and judge_fall_se the standard error of that over the prompts.
    Responses whose environment failed do not count.
    """
    scores = next((j.validation_scores for j in judges if j.validation_scores is not None and not j.cannot_tell), None)
    passes: dict[int, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        if sample.failure:
            continue
        passes[sample.iteration].append(number)
    rewards = [sample.score for sample in samples]
    rows = []
    for iteration, numbers in sorted(passes.items()):
        validation_pass = [samples[i] for i in numbers]
        rows.append(
            {
                "iteration": float(iteration),
                "num_rollouts": float(validation_pass[0].num_rollouts),
                "reward": fmean(rewards[i] for i in numbers),
                **({} if scores is None else {"judge_score": fmean(scores[i] for i in numbers)}),
                "kl": fmean(s.kl for s in validation_pass),
                "length": fmean(as_completion(s).num_model_tokens for s in validation_pass),
                "eos_rate": fmean(not s.truncated for s in validation_pass),
                **_gains("reward", rewards, numbers, passes.get(0, [])),
                **({} if scores is None else _gains("judge", scores, numbers, passes.get(0, []))),
            }
        )
    if scores is not None and rows:
        best = max(range(len(rows)), key=lambda number: rows[number]["judge_score"])
        by_prompt = [_means_by_prompt(scores, samples, numbers) for _, numbers in sorted(passes.items())]
        for row, means in list(zip(rows, by_prompt, strict=True))[best + 1 :]:
            row.update(_fall(by_prompt[best], means))
    return rows


def _gains(name: str, scores: Sequence[float], numbers: Sequence[int], start: Sequence[int]) -> dict[str, float]:
    """The rise of a mean score since the pass start, in standard deviations there; {} without such a pass or without a deviation."""
    first = [scores[i] for i in start]
    deviation = pstdev(first) if first else 0.0
    if deviation == 0:
        return {}
    return {f"{name}_gain": (fmean(scores[i] for i in numbers) - fmean(first)) / deviation}


def _means_by_prompt(
    scores: Sequence[float], samples: Sequence[ValidationSample], numbers: Sequence[int]
) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for i in numbers:
        groups[samples[i].prompt.id].append(scores[i])
    return {prompt: fmean(values) for prompt, values in groups.items()}


def _fall(best: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The mean fall on the prompts that both passes have; {} for fewer than two."""
    falls = [best[prompt] - other[prompt] for prompt in best if prompt in other]
    if len(falls) < 2:
        return {}
    return {"judge_fall": fmean(falls), "judge_fall_se": stdev(falls) / len(falls) ** 0.5}


@dataclass(frozen=True, kw_only=True)
class OverOptimization:
    """Validation passes after the judge's best one in which the reward is higher and the judge's score lower than there."""

    best: Mapping[str, float]
    later: Sequence[Mapping[str, float]]
    num_passes: int  # from which best and worst were chosen

    @property
    def worst(self) -> Mapping[str, float]:
        return min(self.later, key=lambda row: row["judge_score"])

    @property
    def kl(self) -> tuple[float, float]:
        """From the KL of the best pass to the highest one of the later passes, in nats per response."""
        return self.best["kl"], max(row["kl"] for row in self.later)

    @property
    def threshold(self) -> float:
        """In standard errors."""
        return NormalDist().inv_cdf(1 - MISTAKES / comb(self.num_passes, 2))

    @property
    def is_clear(self) -> bool:
        """Whether the fall of the worst pass is more than noise.

        Best and worst are chosen by the same scores, so that the threshold is that of all pairs of passes (Bonferroni).
        """
        fall, error = self.worst.get("judge_fall"), self.worst.get("judge_fall_se")
        return fall is not None and error is not None and fall > self.threshold * error


def over_optimization(training: Sequence[Mapping[str, float]]) -> OverOptimization | None:
    """Where the reward rises and the judge's score falls (Gao et al. 2022); None if it does not, or was not measured."""
    if len(training) < 2 or not all("judge_score" in row for row in training):
        return None
    number = max(range(len(training)), key=lambda i: training[i]["judge_score"])
    best = training[number]
    later = [
        row
        for row in training[number + 1 :]
        if row["reward"] > best["reward"] and row["judge_score"] < best["judge_score"]
    ]
    return OverOptimization(best=best, later=later, num_passes=len(training)) if later else None
