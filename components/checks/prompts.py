"""Prompts that both models answer, and which of the responses are hits."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from components.checks.bounds import Measured
from components.checks.models import Models
from components.rlhf.config.checks import ChecksStageConfig, Grader, PromptsCheck
from components.rlhf.config.rollout import EngineConfig
from components.rlhf.config.scoring import Regex
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.examples import Example, Unusable, as_text
from components.rlhf.data.records import Completion, Conversation, Prompt
from components.rlhf.data.render import Renderer
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.maths.intervals import Floats
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.rewards.owner import Owner
from components.rlhf.rewards.rewards import Resources, open_grades, open_scorer
from components.rlhf.rollout.factory import create_rollout_engine
from components.rlhf.text.errors import InputError

HIT = 0.5  # scores of a pattern are 0 or 1


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The responses of both models, and whether each is a hit; None for one without a grade."""

    sft: list[Completion]
    policy: list[Completion]
    sft_hits: list[bool | None]
    policy_hits: list[bool | None]

    def measured(self, check: PromptsCheck, bound: str) -> Measured:
        """The hits of both models for a bound. A response without a grade counts against the policy."""
        hits_are_bad = bound in ("max_rate", "max_increase")

        def known(hits: list[bool | None], *, of_policy: bool) -> Floats:
            return np.array([hits_are_bad == of_policy if hit is None else hit for hit in hits], dtype=np.float64)

        sft, policy = known(self.sft_hits, of_policy=False), known(self.policy_hits, of_policy=True)
        return Measured(check=check.title, unit="hits per prompt", sft=sft, policy=policy)

    def save(self, path: Path) -> None:
        """A line per prompt."""
        rows = zip(self.sft, self.policy, self.sft_hits, self.policy_hits, strict=True)
        lines = [
            {
                "prompt": sft.prompt.prompt,
                "sft": {"response": sft.response, "is_hit": sft_hit},
                "policy": {"response": policy.response, "is_hit": policy_hit},
            }
            for sft, policy, sft_hit, policy_hit in rows
        ]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def answer_prompts(
    number: int, config: ChecksStageConfig, models: Models, storage: StorageConfig, *, is_chat: bool
) -> Answered:
    """Both models answer the prompts of a check with the same seeds. Raises InputError if the responses cannot be scored."""
    check = config.checks[number]
    assert isinstance(check, PromptsCheck)
    prompts = render_prompts(check, models.sft, config, is_chat=is_chat)
    seeds = [derive_seed("evaluation", config.seed, row) for row in range(len(prompts))]
    engine = create_rollout_engine(models.sft, EngineConfig(), config.sampling, prompts, dtype=models.dtype)
    found: dict[str, list[Completion]] = {}
    try:
        for name, folder in models.folders.items():
            if found:
                engine.load(folder)
            models.progress.log(f"check {check.title}: {len(prompts)} responses of the {name} model")
            found[name] = engine.generate(prompts, config.sampling, seeds, greedy=check.sampling == "greedy")
    finally:
        engine.close()
        models.release()
    sft, policy = found.values()
    hits = hits_of(
        [*sft, *policy], check, Owner(title=f"check {check.title}", key=f"gate.checks.{number}"), models, storage
    )
    return Answered(sft=sft, policy=policy, sft_hits=hits[: len(sft)], policy_hits=hits[len(sft) :])


def render_prompts(check: PromptsCheck, tokenizer: Path, config: ChecksStageConfig, *, is_chat: bool) -> list[Prompt]:
    """The prompts as the model reads them: with the chat template where the run uses it, each as a message of the user."""
    renderer = Renderer(tokenizer=load_tokenizer(tokenizer), is_chat=is_chat, date=config.template_date)
    prompts = []
    for number, text in enumerate(check.prompts):
        example = Example(prompt=Conversation(messages=as_text(text)), is_text=True)
        try:
            prompts.append(renderer.prompt(example))
        except Unusable as error:
            raise InputError(f"prompt {number + 1} cannot be used: {error}".rstrip(".")) from None
    return prompts


def hits_of(
    completions: Sequence[Completion], check: PromptsCheck, owner: Owner, models: Models, storage: StorageConfig
) -> list[bool | None]:
    """Whether each response is a hit; None without a grade. Raises InputError if too many have none."""
    resources = Resources(storage=storage, log=models.progress.log)
    if isinstance(check.endpoint, Grader):
        grader = open_grades(check.endpoint, Owner(title=owner.title, key=f"{owner.key}.endpoint"), resources)
        counts: Counter[str] = Counter()
        try:
            grades = grader.grades(completions, counts)
        finally:
            grader.close()
        cost = f", cost {grader.api.cost(counts):.2f}" if grader.api.cost(counts) else ""
        models.progress.log(f"{owner.title}: {counts['requests']} requests, {counts['cached']} from the cache{cost}")
        return [None if grade is None else grade >= check.threshold for grade in grades]
    scorer = open_scorer(Regex(kind="regex", pattern=check.pattern or ""), owner, resources)
    try:
        hits = [score > HIT for score in scorer.score(completions).tolist()]
        if failed := scorer.counts["failed"]:  # which would count as no hit
            raise InputError(f"{failed} responses could not be searched in time; simplify {owner.key}.pattern")
        return hits
    finally:
        resources.pool.close()
