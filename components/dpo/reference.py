"""Log-probs of the reference, computed once before the first step: the reference is the policy before it is trained."""

import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from components.dpo.examples import Texts, batch_of
from components.dpo.states import FrozenStates
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.packing import plan_for
from components.rlhf.runtime.training import TrainingContext


class Reference:
    """The log-prob of every answer token of some rows of lists of texts, as fp32 in main memory: as large as their ids.

    Implements Saved: it is part of every checkpoint, so that a stage that resumes does not compute it again.
    """

    def __init__(self, lists: Mapping[str, Texts], rows: Mapping[str, Sequence[int]], context: TrainingContext) -> None:
        """rows are those of each list that training or measurements read, the same on every rank."""
        self.lists, self.rows, self.context = lists, rows, context
        self.places: dict[str, dict[int, slice]] = {}  # of each row in the values of its list
        for name, own in rows.items():
            ends = [0, *accumulate(lists[name].num_learned[row] for row in own)]
            self.places[name] = {row: slice(*ends[number : number + 2]) for number, row in enumerate(own)}
        self.values: dict[str, Tensor] = {}  # of each list, the tokens of all rows joined

    def compute(self, actor: Actor, states: FrozenStates, device: torch.device, *, max_tokens: int) -> None:
        """Every rank computes a share, and gets all of it."""
        started = time.monotonic()
        for name in self.lists:
            self.values[name] = self._logprobs(name, actor, states, device, max_tokens)
        size = sum(len(rows) for rows in self.rows.values())
        self.context.progress.log(
            f"reference log-probs of {size:,} texts computed in {time.monotonic() - started:.0f} s; checkpoints keep them"
        )

    @torch.no_grad()
    def _logprobs(self, name: str, actor: Actor, states: FrozenStates, device: torch.device, max_tokens: int) -> Tensor:
        texts, own, places = self.lists[name], self.rows[name], self.places[name]
        values = torch.zeros(sum(texts.num_learned[row] for row in own))
        passes = self.context.microbatches([texts.num_tokens[row] for row in own], max_tokens, plan_for(actor))
        for number, (indices, weight) in enumerate(passes, start=1):
            # A pass at a time, because all of them may take hours.
            self.context.group.watchdog(f"reference log-probs of {name}, pass {number} of {len(passes)}")
            rows = [own[i] for i in indices]
            batch = batch_of([texts[row] for row in rows]).to(device)
            logprobs = actor(batch, SamplingDistribution(), states.of(name, rows))[0].cpu()
            mask = batch.response_mask.cpu()
            for index, row in enumerate(rows) if weight else ():
                values[places[row]] = logprobs[index][mask[index]]
        return self.context.group.sum(values)

    def of(self, name: str, rows: Sequence[int], mask: Tensor) -> Tensor:
        """The log-probs of these texts at the True places of mask [B, T], 0 elsewhere: [B, T]."""
        values = torch.cat([self.values[name][self.places[name][row]] for row in rows])
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values.to(mask.device))

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        return {} if self.context.group.rank > 0 else dict(self.values)

    def load(self, directory: Path) -> None:
        self.values = load_file(directory / "engine-00000.safetensors")
