"""The rewards of a run: a score of each for every response, and their weights in the sum."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from components.rlhf.config.rewards import (
    EnvironmentReward,
    HttpReward,
    LengthReward,
    RepetitionReward,
    Reward,
    RewardModelReward,
)
from components.rlhf.config.scoring import Command, Endpoint, ExactMatch, Function, JsonSchema, Numeric, Regex
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.answers import open_answers
from components.rlhf.rewards.check_pool import CheckPool
from components.rlhf.rewards.command import CommandScorer
from components.rlhf.rewards.environment import EnvironmentScorer
from components.rlhf.rewards.function import FunctionScorer
from components.rlhf.rewards.owner import Owner
from components.rlhf.rewards.protocol import ComputedStates, Scorer
from components.rlhf.rewards.shaping import LengthScorer, RepetitionScorer
from components.rlhf.rewards.verifiable import CheckScorer, ExactMatchScorer
from components.rlhf.text.errors import InputError

if TYPE_CHECKING:
    from components.rlhf.rewards.grades import GradeScorer


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What scorers compute with beside their settings."""

    storage: StorageConfig  # answers of endpoints
    log: Callable[[str], None]
    code: Path | None = None  # folder with the modules and programs of the user
    pool: CheckPool = field(default_factory=CheckPool)


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Several scorers under their names. Each process of a stage has its own, and scores its own responses."""

    scorers: Mapping[str, Scorer]
    weights: Mapping[str, float]
    pool: CheckPool | None = None

    def score_parts(
        self, completions: Sequence[Completion], computed: ComputedStates | None = None
    ) -> dict[str, Tensor]:
        """Raw scores [B] fp32 by name, in the order of the settings, on the CPU or the device of the reward model.

        Raises InputError, or RetryableError for a server that is down, with one sentence that names the reward.
        """
        return {name: scorer.score(completions, computed) for name, scorer in self.scorers.items()}

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises InputError for prompts without the columns that the rewards read: to be called before a long training."""
        for scorer in self.scorers.values():
            check = getattr(scorer, "check_prompts", None)
            if check:
                check(prompts)

    def take_counts(self) -> dict[str, float]:
        """What the rewards have counted since the last call, as NAME/COUNT: responses that failed, requests, tokens, cost.

        The names are the same in all processes; the numbers are of this one.
        """
        taken = {}
        for name, scorer in self.scorers.items():
            counts = getattr(scorer, "counts", {})
            for count in counts:
                taken[f"{name}/{count}"] = float(counts[count])
                counts[count] = 0
        return taken

    def close(self) -> None:
        """End the processes and connections of the rewards. Those of a process that ends without it end too."""
        for scorer in self.scorers.values():
            close = getattr(scorer, "close", None)
            if close:
                close()
        if self.pool:
            self.pool.close()


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum [B] of weight x score. A single score of weight 1 stays as it is, bit for bit."""
    first, *others = (parts[name] if weights[name] == 1 else weights[name] * parts[name] for name in parts)
    for other in others:
        first = first + other.to(first.device)
    return first


def open_rewards(
    rewards: Sequence[Reward],
    reward_scorer: Scorer | None,
    *,
    max_new_tokens: int,
    storage: StorageConfig,
    log: Callable[[str], None],
    code: Path | None = None,
) -> Rewards:
    """The rewards of the settings ppo.rewards. Processes and connections are opened when they are first needed.

    reward_scorer is that of the reward model of the run, which its owner closes; code is the folder with the modules and programs of the
    user. Raises InputError for a reward model without a scorer, and for a key that cannot be one.
    """
    resources = Resources(storage=storage, log=log, code=code)
    scorers: dict[str, Scorer] = {}
    for number, reward in enumerate(rewards):
        owner = Owner(title=f"reward {reward.title}", key=f"ppo.rewards.{number}")
        if isinstance(reward, RewardModelReward):
            if reward_scorer is None:
                raise InputError(f"The {owner.title} needs the reward model of the run, and there is none.")
            scorers[reward.title] = reward_scorer
        elif isinstance(reward, LengthReward):
            longest = reward.max_tokens or max_new_tokens
            scorers[reward.title] = LengthScorer(min_tokens=reward.min_tokens, max_tokens=longest, buffer=reward.buffer)
        elif isinstance(reward, EnvironmentReward):
            scorers[reward.title] = EnvironmentScorer(owner)
        elif isinstance(reward, RepetitionReward):
            scorers[reward.title] = RepetitionScorer(ngram=reward.ngram)
        elif isinstance(reward, HttpReward):
            from components.rlhf.rewards.http_server import HttpScorer  # imports requests

            scorers[reward.title] = HttpScorer(reward, log, owner)
        elif isinstance(reward, Endpoint):
            scorers[reward.title] = open_grades(reward, owner, resources)
        else:
            scorers[reward.title] = open_scorer(reward, owner, resources)
    weights = {reward.title: reward.weight for reward in rewards}
    return Rewards(scorers=scorers, weights=weights, pool=resources.pool)


def open_scorer(
    config: Function | ExactMatch | Regex | Numeric | JsonSchema | Command, owner: Owner, resources: Resources
) -> Scorer:
    """The scorer of a kind that rewards and judges share."""
    if isinstance(config, Function):
        return FunctionScorer(config, owner=owner, code=resources.code, log=resources.log)
    if isinstance(config, ExactMatch):
        return ExactMatchScorer(config, owner)
    if isinstance(config, Command):
        return CommandScorer(config, owner, resources.code, resources.log)
    return CheckScorer(config, owner, resources.pool, resources.log)


def open_grades(config: Endpoint, owner: Owner, resources: Resources) -> "GradeScorer":
    """The scorer that asks a language model, with the answers that it has given before."""
    from components.rlhf.rewards.grades import GradeScorer  # imports requests

    folder = f"{re.sub(r'[^A-Za-z0-9]+', '-', config.model)[:60]}-grades"
    return GradeScorer(config, open_answers(resources.storage, folder, resources.log), resources.log, owner)
