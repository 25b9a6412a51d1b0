"""Metrics of a rollout and of a whole run; components/ppo/README.md explains each name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.ppo.experience import Experience, Learner
from components.ppo.reward_metrics import reward_metrics
from components.rlhf.data.microbatches import computed_tokens
from components.rlhf.data.records import Completion
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.environments.metrics import turn_metrics
from components.rlhf.maths.masked import masked_moments

History = list[dict[str, float]]


def rollout_metrics(e: Experience, group: Group = SINGLE_PROCESS, counted: Tensor | None = None) -> dict[str, float]:
    """Metrics of one rollout over all ranks; without engine_gap where the log-probs of the engine are the old ones.

    counted [B] bool are the rows that are not repetitions of another rank's; None: all of them. Responses whose environment failed do
    not count either.
    """
    every_row = ~e.failed if counted is None else counted & ~e.failed
    mask, ended = e.batch.response_mask & every_row[:, None], every_row & ~e.truncated
    engine_gap = torch.where(mask, (e.old_logprobs - e.engine_logprobs).abs(), 0)

    def moments(x: Tensor, where: Tensor) -> tuple[float, float]:
        mean, variance = masked_moments(x, where, group.sum)
        return mean.item(), variance.item()

    def mean(x: Tensor, where: Tensor) -> float:
        return moments(x, where)[0]

    lengths = e.batch.lengths.tolist()
    computed, real = group.sum(
        torch.tensor(
            [computed_tokens(lengths, [rows.tolist() for rows in e.passes], pack_limit=e.pack_limit), sum(lengths)]
        )
    ).tolist()
    score_mean, score_variance = moments(e.scores, every_row)
    values: dict[str, float] = {}
    if e.old_values is not None:
        returns_variance, residual_variance = moments(e.returns, mask)[1], moments(e.returns - e.old_values, mask)[1]
        values["value/mean"] = mean(e.old_values, mask)
        # 1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant.
        explained = 1 - residual_variance / returns_variance if returns_variance > 1e-8 else 0.0
        values["value/explained_variance"] = explained
    if e.equal_groups is not None:
        values["groups/equal_fraction"] = mean(e.equal_groups.float(), torch.ones_like(e.equal_groups))
    left_out = mean((mask & ~e.loss_mask).float(), mask)
    gaps = {"engine_gap/mean": mean(engine_gap, mask), "engine_gap/max": group.max(engine_gap.max()).item()}
    return {
        "score/mean": score_mean,
        "score/std": score_variance**0.5,
        "score/mean_ended": mean(e.scores, ended),
        "reward/mean": mean(e.rewards, every_row),
        "score/clipped_fraction": mean(e.clipped.float(), every_row),
        "kl/sequence": mean(e.kl.sum(dim=1), every_row),
        "kl/token": mean(e.kl, mask),
        "entropy": mean(e.entropy, mask),
        "response/length": mean(e.batch.response_mask.sum(dim=1).float(), every_row),
        "response/eos_rate": mean(ended.float(), every_row),
        **values,
        "response/left_out": left_out,
        "tokens/computed_per_real": computed / real,
        **({} if e.old_logprobs is e.engine_logprobs else gaps),
    }


def experience_metrics(
    learner: Learner, e: Experience, completions: Sequence[Completion], counted: Tensor | None = None
) -> dict[str, float]:
    """rollout_metrics and, if there are several rewards, those of each; what the rewards have counted; and those of the environment.

    completions are those of the experience. Every rank calls it.
    """
    counts = learner.rewards.take_counts()
    parts = e.reward_parts if len(e.reward_parts) > 1 else {}
    turns = {}
    if learner.config.environment is not None:
        rows = range(len(completions)) if counted is None else counted.nonzero().flatten().tolist()
        turns = turn_metrics([completions[row] for row in rows], learner.group.sum)
    valid = ~e.failed if counted is None else counted & ~e.failed
    return (
        rollout_metrics(e, learner.group, counted)
        | turns
        | reward_metrics(
            parts,
            learner.rewards.weights,
            reward_clip=learner.config.reward_clip,
            counts=counts,
            counted=valid,
            group=learner.group,
        )
    )


def final_metrics(history: History) -> dict[str, float]:
    """The last row of the history under flat names, for KFP and the manifest."""
    last = {name.replace("/", "_"): value for name, value in history[-1].items()}
    return {"num_iterations": float(len(history)), "score_first": history[0]["score/mean"], **last}
