"""Hand-written comparisons."""

from components.evaluation.compare import Comparison, ScoredResponses
from components.rlhf.data.records import Completion, Prompt


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
    sft: list[float],
    ppo: list[float],
    *,
    kl: list[float] | None = None,
    cut_sft: list[float] | None = None,
    cut_ppo: list[float] | None = None,
    sft_ends: list[tuple[int, bool]] | None = None,
    ppo_ends: list[tuple[int, bool]] | None = None,
) -> Comparison:
    """A comparison from judge scores, one per prompt (cut_*: of the cut responses); ends are (number of tokens, truncated)."""
    prompts = [Prompt(prompt=f"prompt {i}", id=f"heldout-{i}") for i in range(len(sft))]

    def scored(
        name: str, scores: list[float], cut: list[float] | None, ends: list[tuple[int, bool]] | None
    ) -> ScoredResponses:
        ends = ends or [(3, False)] * len(scores)
        return ScoredResponses(
            completions=[
                completion(prompt, f"{name} response {i}", length=length, truncated=truncated)
                for i, (prompt, (length, truncated)) in enumerate(zip(prompts, ends, strict=True))
            ],
            judge_scores=scores,
            cut_judge_scores=cut or scores,
            rewards=[score / 2 for score in scores],
        )

    return Comparison(
        prompts=prompts,
        sft=scored("sft", sft, cut_sft, sft_ends),
        ppo=scored("ppo", ppo, cut_ppo, ppo_ends),
        kl=kl or [1.0] * len(sft),
    )
