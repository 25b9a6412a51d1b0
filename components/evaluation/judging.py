"""Asks every judge which of two responses is better, and whether its answers can be relied on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from components.evaluation.compare import Comparison
from components.evaluation.ranks import Ranks
from components.evaluation.statistics import Floats, pairwise_wins
from components.rlhf.config.judge import RewardModelJudge
from components.rlhf.config.scoring import VERIFIABLE
from components.rlhf.data.records import Completion, ValidationSample
from components.rlhf.rewards.agreement import MIN_ANSWERED
from components.rlhf.rewards.judges import MICROBATCH_TOKENS, JudgeEntry, JudgeResources, OpenJudge, open_judge
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one judge says about the rows of a comparison."""

    entry: JudgeEntry
    wins: Floats  # [R] of the policy over the fine-tuned model: 1, 0, 0.5 for a tie; nan without an answer
    consistent: list[bool]  # [R]: the same answer in both orders
    sft_scores: list[float] | None = None  # None for a judge that gives no scores, and in the next four
    policy_scores: list[float] | None = None
    cut_wins: Floats | None = None  # of the responses that are cut to equal length
    validation_scores: list[float] | None = None  # of the samples of PPO's validation passes
    counts: dict[str, float] = field(default_factory=dict)  # requests, tokens and cost of an endpoint
    error: str = ""  # why it could not be asked

    @property
    def name(self) -> str:
        return self.entry.settings.title

    @property
    def verifies(self) -> bool:
        """Whether the judge says which responses are right, with a score of at least 1."""
        return isinstance(self.entry.settings, VERIFIABLE)

    @property
    def is_pairwise(self) -> bool:
        """Whether the judge read two responses at a time, in both orders."""
        return not self.error and self.policy_scores is None

    @property
    def cannot_tell(self) -> str:
        """Why this judge gives no verdict, as the end of a sentence; empty if it gives one."""
        if self.error:
            return self.error
        if self.entry.cannot_tell:
            return self.entry.cannot_tell
        answered = float((~np.isnan(self.wins)).mean())
        if answered < MIN_ANSWERED:
            reasons = [
                f"{self.counts[name]:.0f} {name}"
                for name in ("refused", "unreadable", "rejected")
                if self.counts.get(name)
            ]
            why = f" ({', '.join(reasons)})" if reasons else ""
            return f"it answered only {answered:.0%} of the comparisons{why}"
        return ""


def judge_all(
    entries: Sequence[JudgeEntry],
    folder: Path,
    comparison: Comparison,
    validation: Sequence[ValidationSample],
    resources: JudgeResources,
    asked: Sequence[Judged] = (),
) -> list[Judged]:
    """The answers of all judges of the artifact in folder, the deciding one first. A judge that fails is no error.

    asked are answers of some of them.
    """
    known = {judged.name: judged for judged in asked}
    return [
        known.get(entry.settings.title) or judge_one(entry, folder, comparison, validation, resources)
        for entry in entries
    ]


def judge_by_reward_models(
    entries: Sequence[JudgeEntry],
    folder: Path,
    comparison: Comparison,
    validation: Sequence[ValidationSample],
    resources: JudgeResources,
    ranks: Ranks,
) -> list[Judged]:
    """The answers of the judges that are reward models, which all ranks compute together; every rank gets them."""
    load = partial(ranks.load_scorer, microbatch_tokens=MICROBATCH_TOKENS)
    judged = []
    for entry in entries:
        if isinstance(entry.settings, RewardModelJudge):
            ranks.group.watchdog(f"evaluation, judge {entry.settings.title}")
            judged.append(judge_one(entry, folder, comparison, validation, replace(resources, load_scorer=load)))
            ranks.release()
    return judged


def judge_one(
    entry: JudgeEntry,
    folder: Path,
    comparison: Comparison,
    validation: Sequence[ValidationSample],
    resources: JudgeResources,
) -> Judged:
    name, num_rows = entry.settings.title, len(comparison.groups)
    try:
        judged = _ask(open_judge(entry, folder, resources), comparison, validation)
    except InputError as error:
        wins = np.full(num_rows, np.nan)
        judged = Judged(entry=entry, wins=wins, consistent=[False] * num_rows, error=redact(str(error)).rstrip("."))
    problem = judged.cannot_tell
    resources.log(
        f"judge {name} cannot tell, because {problem}" if problem else f"judge {name} compared {num_rows} pairs"
    )
    return judged


def _ask(judge: OpenJudge, comparison: Comparison, validation: Sequence[ValidationSample]) -> Judged:
    sft, policy = comparison.sft, comparison.policy
    if judge.scorer is None:
        preferences = judge.pairwise.compare(policy.completions, sft.completions)
        return Judged(
            entry=judge.entry,
            wins=preferences.wins.double().numpy(),
            consistent=preferences.consistent.tolist(),
            counts=preferences.counts,
        )
    verifies = isinstance(judge.entry.settings, VERIFIABLE)
    cut_parts = [[], []] if verifies else [sft.cut, policy.cut]  # a cut response may have lost its answer
    # In one call, because a call may start a process.
    parts = [sft.completions, policy.completions, *cut_parts, [as_completion(sample) for sample in validation]]
    scores = judge.scorer.score([completion for part in parts for completion in part]).tolist()
    take = _taker(scores)
    sft_scores, policy_scores, cut_sft, cut_policy, validation_scores = (take(len(part)) for part in parts)
    return Judged(
        entry=judge.entry,
        wins=pairwise_wins(policy_scores, sft_scores),
        consistent=[True] * len(policy_scores),
        sft_scores=sft_scores,
        policy_scores=policy_scores,
        cut_wins=None if verifies else pairwise_wins(cut_policy, cut_sft),
        validation_scores=validation_scores,
    )


def _taker(values: Sequence[float]) -> Callable[[int], list[float]]:
    remaining = iter(values)
    return lambda count: [next(remaining) for _ in range(count)]


def as_completion(sample: ValidationSample) -> Completion:
    return Completion(
        prompt=sample.prompt,
        prompt_ids=sample.prompt_ids,
        response_ids=sample.response_ids,
        response=sample.response,
        logprobs=None,
        truncated=sample.truncated,
        response_mask=sample.response_mask,
        turns=sample.turns,
        environment_reward=sample.environment_reward,
        failure=sample.failure,
    )
