"""The loss on demonstrations that is mixed into the steps of the actor."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.batching import collate, stream_slice
from components.rlhf.data.datasets import load_records, read_header
from components.rlhf.data.microbatches import local_microbatches
from components.rlhf.data.records import Demonstration
from components.rlhf.data.token_files import PackedTexts, encode_all
from components.rlhf.engine.protocol import Group
from components.rlhf.maths.losses import aggregate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.packing import plan_for


class DemonstrationLoss:
    """The next-token loss on demonstrations, as in SFT (PPO-ptx, Ouyang et al. 2022, equation 2)."""

    def __init__(
        self, actor: Actor, texts: PackedTexts, *, batch_size: int, max_tokens: int, seed: int, group: Group
    ) -> None:
        """batch_size demonstrations per step, over all ranks; at most max_tokens in one forward pass."""
        self.actor, self.texts, self.group = actor, texts, group
        self.batch_size, self.max_tokens, self.seed = batch_size, max_tokens, seed

    def losses(self, step: int) -> Iterator[tuple[Tensor, bool]]:
        """This rank's shares of the loss of a step (from 0), which sum to the mean over its tokens; and whether it is the last one."""
        batch = stream_slice(len(self.texts), step * self.batch_size, self.batch_size, seed=self.seed)
        denominator = sum(self.texts.num_learned[row] for row in batch)
        microbatches = local_microbatches(
            [self.texts.num_tokens[row] for row in batch],
            self.max_tokens,
            rank=self.group.rank,
            world_size=self.group.world_size,
            max_over_ranks=self.group.max_int,
            plan=plan_for(self.actor),
        )
        for number, (indices, weight) in enumerate(microbatches, start=1):
            loss = self._loss([batch[index] for index in indices], denominator)
            yield weight * loss, number == len(microbatches)

    def _loss(self, rows: Sequence[int], denominator: int) -> Tensor:
        texts = [self.texts[row] for row in rows]
        batch = collate(
            [t.prompt_ids for t in texts], [t.response_ids for t in texts], [t.response_mask for t in texts]
        ).to(next(self.actor.parameters()).device)
        logprobs, _ = self.actor(batch, SamplingDistribution())
        return aggregate(-logprobs, batch.response_mask, "token-mean", denominator)


def load_demonstrations(
    folder: Path | None,
    config: PpoStageConfig,
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    group: Group,
    log: Callable[[str], None],
) -> DemonstrationLoss | None:
    """The loss on the demonstrations of a data set, or None without one."""
    if folder is None:
        return None
    texts = encode_all(
        load_records(folder, "train", Demonstration),
        tokenizer=tokenizer,
        max_tokens=read_header(folder).max_tokens,
        folder=folder,
        log=log,
        split="train",
    )
    return DemonstrationLoss(
        actor,
        texts,
        batch_size=config.ppo.minibatch,
        max_tokens=config.ppo.training.microbatch_tokens,
        seed=config.seed,
        group=group,
    )
