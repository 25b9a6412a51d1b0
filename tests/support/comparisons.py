"""Hand-written comparisons, and what judges say about them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from components.evaluation.compare import Comparison, Responses
from components.evaluation.judging import Judged
from components.evaluation.statistics import pairwise_wins
from components.rlhf.config.judge import EndpointJudge, LinearJudge
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.agreement import Agreement
from components.rlhf.rewards.judges import JudgeEntry

# Agreements with people that are above chance, and that are not.
GOOD = Agreement(
    accuracy=0.811,
    low=0.75,
    high=0.86,
    num_pairs=200,
    num_asked=200,
    num_independent=180,
    longer_wins=0.55,
    consistency=0.9,
)
CHANCE = replace(GOOD, accuracy=0.52, low=0.45, high=0.59)


def completion(prompt: Prompt, response: str, *, length: int = 3, truncated: bool = False) -> Completion:
    return Completion(
        prompt=prompt,
        prompt_ids=[1],
        response_ids=[2] * length,
        response=response,
        logprobs=None,
        truncated=truncated,
    )


def comparison_of(
    sft: Sequence[float],
    ppo: Sequence[float],
    *,
    groups: list[int] | None = None,
    kl: list[float] | None = None,
    exact_kl: list[float] | None = None,
    sft_ends: list[tuple[int, bool]] | None = None,
    ppo_ends: list[tuple[int, bool]] | None = None,
) -> Comparison:
    """A comparison from two scores per row, of which the rewards are half; ends are (number of tokens, truncated).

    Each row has a prompt of its own, unless groups has the number of the prompt of each row.
    """
    groups = list(range(len(sft))) if groups is None else groups
    prompts = [Prompt(prompt=f"prompt {i}", id=f"heldout-{i}") for i in groups]

    def responses(name: str, scores: Sequence[float], ends: list[tuple[int, bool]] | None) -> Responses:
        ends = ends or [(3, False)] * len(scores)
        completions = [
            completion(prompt, f"{name} response {i}", length=length, truncated=truncated)
            for i, (prompt, (length, truncated)) in enumerate(zip(prompts, ends, strict=True))
        ]
        return Responses(
            completions=completions,
            cut=[replace(c, truncated=True) for c in completions],
            rewards=[score / 2 for score in scores],
        )

    return Comparison(
        groups=groups,
        sft=responses("sft", sft, sft_ends),
        policy=responses("ppo", ppo, ppo_ends),
        kl=kl or [1.0] * len(sft),
        exact_kl=exact_kl or [0.5] * len(sft),
    )


def entry_of(name: str = "linear", agreement: Agreement | None = GOOD) -> JudgeEntry:
    return JudgeEntry(settings=LinearJudge(name=name), agreement=agreement)


def judged_of(
    sft: Sequence[float],
    ppo: Sequence[float],
    *,
    cut_sft: Sequence[float] | None = None,
    cut_ppo: Sequence[float] | None = None,
    name: str = "linear",
    agreement: Agreement | None = GOOD,
    **changes: Any,
) -> Judged:
    """What a judge that gives scores says, from its scores of each row (cut_*: of the cut responses)."""
    return replace(
        Judged(
            entry=entry_of(name, agreement),
            wins=pairwise_wins(ppo, sft),
            consistent=[True] * len(sft),
            sft_scores=list(sft),
            policy_scores=list(ppo),
            cut_wins=pairwise_wins(ppo if cut_ppo is None else cut_ppo, sft if cut_sft is None else cut_sft),
        ),
        **changes,
    )


def pairwise_of(
    wins: Sequence[float],
    *,
    consistent: list[bool] | None = None,
    name: str = "gpt",
    agreement: Agreement | None = GOOD,
    **changes: Any,
) -> Judged:
    """What a judge says that reads two responses at a time; nan is no answer."""
    settings = EndpointJudge(kind="endpoint", url="http://models:8000/v1", model="a-model", name=name)
    return replace(
        Judged(
            entry=JudgeEntry(settings=settings, agreement=agreement),
            wins=np.array(wins, dtype=np.float64),
            consistent=[True] * len(wins) if consistent is None else consistent,
        ),
        **changes,
    )


def both_of(sft: Sequence[float], ppo: Sequence[float], **options: Any) -> tuple[Comparison, Judged]:
    """A comparison, and a judge that gives these scores."""
    return comparison_of(sft, ppo, **options), judged_of(sft, ppo)
