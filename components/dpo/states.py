"""Output of the frozen layers for every text that a rank computes with: it is the same in all steps and epochs, and in the reference."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from components.dpo.examples import Texts, batch_of
from components.rlhf.models.actor import Actor
from components.rlhf.models.packing import plan_for
from components.rlhf.runtime.training import TrainingContext

MAX_BYTES = 2**30  # that a rank keeps, beside its model


class FrozenStates:
    """Hidden states after the frozen layers, computed once; none if no layer is frozen, or if they would take more than MAX_BYTES.

    A stage that resumes computes them again, in the same passes, so that they are the same bit for bit.
    """

    def __init__(self, actor: Actor, device: torch.device) -> None:
        self.actor, self.device = actor, device
        self.states: dict[tuple[str, int], Tensor] = {}  # list and row -> [tokens, H]

    @torch.no_grad()
    def compute(
        self,
        lists: Mapping[str, Texts],
        rows: Mapping[str, Sequence[int]],
        context: TrainingContext,
        *,
        max_tokens: int,
    ) -> None:
        """Of these rows of each list, which may differ between ranks: weights that layers are frozen of are never sharded."""
        if self.actor.num_frozen_layers == 0:
            return
        count = sum(lists[name].num_tokens[row] for name, own in rows.items() for row in own)
        size = count * self.actor.lm.config.get_text_config().hidden_size * torch.finfo(self.actor.dtype).bits // 8
        if size > MAX_BYTES:
            context.progress.log(
                f"the output of the frozen layers for {count:,} tokens ({size / 2**30:.1f} GiB) is not kept, but computed in every pass"
            )
            return
        for name, own in rows.items():
            lengths = [lists[name].num_tokens[row] for row in own]
            for indices in plan_for(self.actor)(lengths, max_tokens):
                context.group.watchdog(f"frozen layers, {len(self.states)} texts done")
                texts = [lists[name][own[i]] for i in indices]
                states = self.actor.trunk(batch_of(texts).to(self.device))
                assert states is not None
                for index, i in enumerate(indices):
                    self.states[name, own[i]] = states[index, : lengths[i]].clone()
        context.progress.log(f"frozen layers computed once for {len(self.states):,} texts, {size / 2**20:.0f} MiB")

    def of(self, name: str, rows: Sequence[int]) -> Tensor | None:
        """The states of these rows of a list, padded with 0: [B, S, H]. None if one of them is not there."""
        found = [self.states.get((name, row)) for row in rows]
        there = [states for states in found if states is not None]
        if len(there) < len(found):
            return None
        return torch.nn.utils.rnn.pad_sequence(there, batch_first=True)
