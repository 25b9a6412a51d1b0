"""What training on a fixed data set has in common (sft, reward_model, dpo): optimizer steps over batches, resumed from checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.data.microbatches import Plan, computed_tokens, local_microbatches, plan_passes
from components.rlhf.engine.protocol import Group, Saved, TrainEngine
from components.rlhf.text.errors import require_finite
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import Tracker

NOT_SHOWN = ("grad_norm", "learning_rate", "computed_per_real_token")  # in the progress of a stage


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """What every training stage reports to and works with."""

    checkpoints: CheckpointManager
    progress: Progress
    tracker: Tracker
    group: Group

    def microbatches(
        self, lengths: Sequence[int], max_tokens: int, plan: Plan = plan_passes
    ) -> list[tuple[list[int], float]]:
        """This rank's microbatches (indices, weight) of records with these lengths; the same number on every rank."""
        rank, world_size = self.group.rank, self.group.world_size
        return local_microbatches(
            lengths, max_tokens, rank=rank, world_size=world_size, max_over_ranks=self.group.max_int, plan=plan
        )

    def export(self, engine: TrainEngine) -> Iterator[tuple[str, Tensor]]:
        """The weights of an engine, whole and one at a time, within the time limit of a step. Every rank iterates over all of them."""
        self.group.watchdog("export of the weights")
        yield from engine.full_weights()
        self.group.watchdog(None)  # rank 0 alone goes on: it computes digests, and may publish the model


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The records of a training run, and which of them each optimizer step takes."""

    records: str  # what they are, for error messages
    lengths: Sequence[int]  # tokens of each record
    steps: Sequence[Sequence[int]]  # indices of the records of each step
    max_tokens: int  # of one microbatch, padded
    plan: Plan = plan_passes  # how the records of a step are grouped into microbatches


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What a stage does around each optimizer step, on every rank, and what its checkpoints have beside the engine.

    With more than the engine, the first checkpoint is saved before the first step, so that nothing of it is computed twice.
    """

    before: Callable[[int], None]  # of a step, from 1
    after: Callable[
        [int, dict[str, float], dict[str, Any]], None
    ]  # of a step with its metrics and the state, before that is saved
    saved: Mapping[str, Saved] = field(default_factory=dict)  # which initial_state fills


def train_on_batches(
    context: TrainingContext,
    name: str,
    engine: TrainEngine,
    batches: Batches,
    shares_of: Callable[[Sequence[int], Sequence[int]], dict[str, Tensor]],
    initial_state: Callable[[], dict[str, Any]] = dict,
    extras: Extras | None = None,
) -> dict[str, Any]:
    """Take every optimizer step that the latest checkpoint of model `name` has not; return the state kept in checkpoints.

    shares_of(rows, batch) gives what the records `rows` add to the loss and to the metrics of their batch, as scalars;
    "loss" carries the gradient, and "computed_tokens" and "real_tokens" count tokens with and without padding. initial_state is called
    when there is no checkpoint, before the first step.
    """
    checkpoints, progress = context.checkpoints, context.progress
    saved: dict[str, Saved] = {name: engine, **(extras.saved if extras else {})}
    state = checkpoints.restore(saved)
    if state is None:
        steps_done, state = 0, initial_state()
        if len(saved) > 1:
            checkpoints.save(0, saved, state)
    else:
        steps_done = int(state.pop("step"))
        progress.log(f"resuming after step {steps_done} from {checkpoints.latest}")
    for step, batch in enumerate(batches.steps[steps_done:], start=steps_done + 1):
        context.group.watchdog(f"{name} step {step}")
        if extras:
            extras.before(step)
        values = _optimizer_step(context, engine, batches, batch, shares_of)
        with checkpoints.named_on_failure():
            for what in ("loss", "grad_norm"):
                require_finite(values[what], what=what, step=step, batch=f"{batches.records} {list(batch)}")
        context.tracker.log({f"train/{metric}": value for metric, value in values.items()}, step)
        if extras:
            extras.after(step, values, state)
        shown = {metric: value for metric, value in values.items() if metric not in NOT_SHOWN and "/" not in metric}
        progress.step(step, len(batches.steps), shown, samples=len(batch))
        if checkpoints.should_save():
            context.tracker.flush()
            checkpoints.save(step, saved, state)
    return state


def token_counts(lengths: Sequence[int], passes: Sequence[Sequence[int]], *, pack_limit: int) -> dict[str, Tensor]:
    """What shares_of counts for forward passes over rows of these lengths."""
    return {
        "computed_tokens": torch.tensor(computed_tokens(lengths, passes, pack_limit=pack_limit), dtype=torch.float64),
        "real_tokens": torch.tensor(sum(lengths), dtype=torch.float64),
    }


def _optimizer_step(
    context: TrainingContext,
    engine: TrainEngine,
    batches: Batches,
    batch: Sequence[int],
    shares_of: Callable[[Sequence[int], Sequence[int]], dict[str, Tensor]],
) -> dict[str, float]:
    """One step over this rank's microbatches; the loss and the metrics are summed over all ranks."""
    microbatches = context.microbatches([batches.lengths[i] for i in batch], batches.max_tokens, batches.plan)
    sums: dict[str, Tensor] = {}
    for number, (rows, weight) in enumerate(microbatches, start=1):
        shares = shares_of([batch[i] for i in rows], batch)
        engine.backward(weight * shares["loss"], last=number == len(microbatches))
        for metric, share in shares.items():
            sums[metric] = sums.get(metric, 0) + weight * share.detach()
    device = sums["loss"].device  # counts of tokens are on the CPU
    totals = context.group.sum(torch.stack([value.to(device) for value in sums.values()])).tolist()
    info = engine.step()
    values = dict(zip(sums, totals, strict=True))
    values["computed_per_real_token"] = values.pop("computed_tokens") / max(values.pop("real_tokens"), 1)
    return values | {"grad_norm": info.grad_norm, "learning_rate": info.learning_rate}
