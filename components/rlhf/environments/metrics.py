"""Metrics of responses of several turns; components/ppo/README.md explains each name."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.rlhf.data.records import Completion
from components.rlhf.environments.protocol import TIMED_OUT


def turn_metrics(completions: Sequence[Completion], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Means over the responses of all processes, which `reduce` sums over; all but the failures without those that failed."""
    kept = [completion for completion in completions if not completion.failure]
    late = [completion for completion in completions if completion.failure.startswith(TIMED_OUT)]
    sums = [
        len(completions),
        len(kept),
        len(late),
        sum(sum(turn.speaker == "model" for turn in c.turns) for c in kept),
        sum(len(c.response_ids) - c.num_model_tokens for c in kept),
        sum(c.environment_reward or 0.0 for c in kept),
    ]
    total, num_kept, num_late, turns, tokens, reward = reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    return {
        "environment/turns": turns / max(num_kept, 1),
        "environment/tokens": tokens / max(num_kept, 1),
        "environment/reward": reward / max(num_kept, 1),
        "environment/failed": (total - num_kept) / max(total, 1),
        "environment/timed_out": num_late / max(total, 1),
    }
