"""Log-probs of the reference, computed once before the first step: the reference is the policy before it is trained."""

import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from components.dpo.examples import Mismatches, batch_of
from components.rlhf.data.token_files import PackedTexts
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.packing import plan_for
from components.rlhf.runtime.training import TrainingContext

Texts = PackedTexts | Mismatches


class Reference:
    """The log-prob of every answer token of several lists of texts, as fp32 in main memory: as large as their ids.

    Implements Saved: it is part of every checkpoint, so that a stage that resumes does not compute it again.
    """

    def __init__(self, lists: Mapping[str, Texts], context: TrainingContext) -> None:
        self.lists, self.context = lists, context
        self.starts = {name: [0, *accumulate(texts.num_learned)] for name, texts in lists.items()}
        self.values: dict[str, Tensor] = {}  # of each list, all tokens joined

    def compute(self, actor: Actor, device: torch.device, *, max_tokens: int) -> None:
        """Every rank computes a share, and gets all of it."""
        started = time.monotonic()
        for name, texts in self.lists.items():
            self.values[name] = self._logprobs(name, texts, actor, device, max_tokens)
        size = sum(len(texts) for texts in self.lists.values())
        self.context.progress.log(
            f"reference log-probs of {size:,} texts computed in {time.monotonic() - started:.0f} s; they are part of every checkpoint"
        )

    @torch.no_grad()
    def _logprobs(self, name: str, texts: Texts, actor: Actor, device: torch.device, max_tokens: int) -> Tensor:
        starts = self.starts[name]
        values = torch.zeros(starts[-1])
        if not len(texts):
            return values
        passes = self.context.microbatches(texts.num_tokens, max_tokens, plan_for(actor))
        for number, (rows, weight) in enumerate(passes, start=1):
            # A pass at a time, because all of them may take hours.
            self.context.group.watchdog(f"reference log-probs of {name}, pass {number} of {len(passes)}")
            batch = batch_of([texts[row] for row in rows]).to(device)
            logprobs = actor(batch, SamplingDistribution())[0].cpu()
            mask = batch.response_mask.cpu()
            for index, row in enumerate(rows) if weight else ():
                values[starts[row] : starts[row + 1]] = logprobs[index][mask[index]]
        return self.context.group.sum(values)

    def of(self, name: str, rows: Sequence[int], mask: Tensor) -> Tensor:
        """The log-probs of these texts at the True places of mask [B, T], 0 elsewhere: [B, T]."""
        starts = self.starts[name]
        values = torch.cat([self.values[name][starts[row] : starts[row + 1]] for row in rows])
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values.to(mask.device))

    def snapshot(self, *, moments: bool = True) -> dict[str, Tensor]:
        return {} if self.context.group.rank > 0 else dict(self.values)

    def load(self, directory: Path) -> None:
        self.values = load_file(directory / "engine-00000.safetensors")
