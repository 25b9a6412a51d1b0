"""Evaluations of the policy on the validation prompts, and the one objective that patience and keep compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from components.ppo.experience import Experience, Learner, make_experience
from components.ppo.metrics import experience_metrics
from components.rlhf.data.records import Completion, Prompt, ValidationSample
from components.rlhf.engine.protocol import Group
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.rollout.protocol import Sampler


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers by which the policies of a run are compared."""

    iteration: int  # 0: the SFT model
    objective: float
    kl: float  # to the SFT model, in nats per response


def objective_of(reward: float, kl: float, *, kl_coef: float) -> float:
    """Mean reward minus the cost of the KL, in nats per response.

    kl_coef is the one of the settings, also where a controller adapts it or the penalty is part of the loss: an objective that changed
    during a run could not be compared.
    """
    return reward - kl_coef * kl


def validate(
    learner: Learner, sampler: Sampler, prompts: Sequence[Prompt], *, iteration: int
) -> tuple[dict[str, float], list[ValidationSample]]:
    """Sample a response to every prompt with the current policy; metrics and samples of all ranks, in the order of the prompts.

    Every rank takes equally many prompts, because all of them run as many forward passes: one without a prompt of its own repeats the
    first one, which does not count.
    """
    config, group = learner.config, learner.group
    rows, num_own = shared_rows(len(prompts), group)
    # The same draws in every evaluation of every run, so that only the policy differs.
    seeds = [derive_seed("validation", 0, row) for row in rows]
    completions = sampler.generate([prompts[row] for row in rows], config.rollout.sampling, seeds)
    experience = make_experience(learner, completions, kl_coef=0.0)
    counted = torch.arange(len(rows), device=experience.truncated.device) < num_own
    metrics = experience_metrics(learner, experience, completions, counted)
    num_rollouts = iteration * config.rollout.num_prompts * config.rollout.samples_per_prompt
    samples = _samples(completions, experience, iteration=iteration, num_rollouts=num_rollouts)[:num_own]
    found = group.gather(list(zip(rows[:num_own], samples, strict=True)))
    return metrics, [sample for _, sample in sorted(found, key=itemgetter(0))]


def shared_rows(count: int, group: Group) -> tuple[list[int], int]:
    """Rows of range(count) for this rank, equally many on every rank, and how many of them, the first ones, are its own."""
    own = list(range(group.rank, count, group.world_size))
    padding = -(-count // group.world_size) - len(own)
    return own + [0] * padding, len(own)


def _samples(
    completions: Sequence[Completion], experience: Experience, *, iteration: int, num_rollouts: int
) -> list[ValidationSample]:
    return [
        ValidationSample(
            iteration=iteration,
            num_rollouts=num_rollouts,
            prompt=completion.prompt,
            prompt_ids=completion.prompt_ids,
            response_ids=completion.response_ids,
            response=completion.response,
            truncated=completion.truncated,
            score=score,
            kl=kl,
            response_mask=completion.response_mask,
            turns=completion.turns,
            environment_reward=completion.environment_reward,
            failure=completion.failure,
        )
        for completion, score, kl in zip(
            completions, experience.scores.tolist(), experience.kl.sum(dim=1).tolist(), strict=True
        )
    ]
