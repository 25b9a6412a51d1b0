"""Reward-model training: chosen above rejected, on whole texts and on texts cut short."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.batching import TokenBatch, collate, local_microbatches, num_steps, step_batches
from components.rlhf.data.records import PreferencePair
from components.rlhf.data.tokenizer import EncodedText, encode_text
from components.rlhf.engine.factory import create_engine, shards_weights
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.losses import pairwise_loss
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import collect_weights, load_scalar_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import require_finite
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import Tracker


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    chosen: EncodedText
    rejected: EncodedText
    margin: float


class RewardModelTrainer:
    """One run of reward-model training; `model` is the result."""

    def __init__(
        self,
        config: RewardModelStageConfig,
        start: Path,
        checkpoints: CheckpointManager,
        progress: Progress,
        tracker: Tracker,
        group: Group = SINGLE_PROCESS,
    ) -> None:
        self.config, self.group = config, group
        self.checkpoints = checkpoints
        self.progress = progress
        self.tracker = tracker
        self.dtype = compute_dtype(config.model.precision)
        self.device = default_device()
        frozen, lora = config.model.num_frozen_layers, config.model.lora
        lm = load_scalar_lm(start, num_frozen_layers=frozen, dtype=self.dtype, trainable=lora is None, seed=config.seed)
        if lora:
            add_adapters(lm, lora, num_frozen_layers=frozen, seed=config.seed)
        training = config.reward_model.training
        if not shards_weights(training):
            lm.to(self.device)
        if training.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        self.model = ScalarModel(lm, num_frozen_layers=frozen, dtype=self.dtype)
        self.engine: TrainEngine | None = None

    def train(
        self, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[PreferencePair], *, max_tokens: int
    ) -> dict[str, float]:
        config = self.config.reward_model
        encoded = [self._encode(tokenizer, pair, max_tokens) for pair in pairs]
        schedule = {"num_epochs": config.num_epochs, "max_steps": config.max_steps}
        total = num_steps(len(encoded), config.batch_size, **schedule)
        engine = create_engine(self.model, config.training, num_steps=total, group=self.group, dtype=self.dtype)
        self.engine = engine
        state = self.checkpoints.restore({"reward_model": engine})
        done = int(state["step"]) if state else 0
        if state:
            self.progress.log(f"resuming after step {done} from {self.checkpoints.latest}")
        for step, indices in enumerate(
            step_batches(len(encoded), config.batch_size, seed=self.config.seed, **schedule), start=1
        ):
            if step <= done:
                continue
            self.group.watchdog(f"reward model step {step}")
            values = self._step(engine, [encoded[i] for i in indices], step, indices)
            self.tracker.log(values, step)
            self.progress.step(step, total, {"loss": values["train/loss"], "accuracy": values["train/accuracy"]})
            if self.checkpoints.should_save():
                self.tracker.flush()
                self.checkpoints.save(step, {"reward_model": engine}, {})
        self.group.watchdog("reward model, last measurements")
        return {"num_steps": float(total)}

    def _encode(self, tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_tokens: int) -> EncodedPair:
        return EncodedPair(
            chosen=encode_text(tokenizer, pair.prompt, pair.chosen, max_tokens=max_tokens),
            rejected=encode_text(tokenizer, pair.prompt, pair.rejected, max_tokens=max_tokens),
            margin=pair.margin or 0.0 if self.config.reward_model.use_margin else 0.0,
        )

    def weights(self) -> dict[str, Tensor]:
        """The trained weights in main memory of the first process; every process calls it."""
        assert self.engine is not None, "train() comes first"
        return collect_weights(self.engine.full_weights(), keep=self.group.rank == 0)

    def _step(self, engine: TrainEngine, pairs: list[EncodedPair], step: int, indices: list[int]) -> dict[str, float]:
        lengths = [2 * max(pair.chosen.num_tokens, pair.rejected.num_tokens) for pair in pairs]
        parts = local_microbatches(
            lengths,
            self.config.reward_model.training.microbatch_tokens,
            rank=self.group.rank,
            world_size=self.group.world_size,
            max_over_ranks=self.group.max_int,
        )
        own = torch.zeros(2, device=self.device)  # loss, pairs in the right order
        for number, (rows, weight) in enumerate(parts, start=1):
            losses, wins = self.losses([pairs[i] for i in rows])
            loss = weight * losses.sum() / len(pairs)
            own += torch.stack([loss.detach(), weight * wins.sum()])
            engine.backward(loss, last=number == len(parts))
        total, correct = self.group.sum(own).tolist()
        info = engine.step()
        for what, value in (("The loss", total), ("The gradient", info.grad_norm)):
            require_finite(value, name=what, step=step, batch=f"pairs {indices}", checkpoint=self.checkpoints.latest)
        return {
            "train/loss": total,
            "train/accuracy": correct / len(pairs),
            "train/grad_norm": info.grad_norm,
            "train/learning_rate": info.learning_rate,
        }

    def losses(self, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
        """Loss of each pair, and whether its chosen text scores higher: both [N].

        prefix_loss w mixes two comparisons: (1 - w) of the whole texts, and w of the two texts cut at the same number of
        completion tokens, averaged over all cuts that both reach with weight proportional to the length. Without the second,
        a text that does not end is out of distribution, and PPO learns not to end (the score of the same human text rises
        when its EOS is taken away).
        """
        config = self.config.reward_model
        texts = [p.chosen for p in pairs] + [p.rejected for p in pairs]
        batch: TokenBatch = collate([t.prompt_ids for t in texts], [t.response_ids for t in texts]).to(self.device)
        by_length = self.model.prefix_scores(batch)  # [2N, T]
        whole = by_length.gather(1, (batch.response_lengths - 1)[:, None]).squeeze(1)
        chosen, rejected = whole.chunk(2)
        margin = torch.tensor([p.margin for p in pairs], device=self.device)
        loss = pairwise_loss(chosen, rejected, margin)
        if config.prefix_loss > 0:
            cut_chosen, cut_rejected = by_length.chunk(2)
            cuts = torch.arange(1, by_length.shape[1] + 1, device=self.device)  # column t is a cut after t + 1 tokens
            shared = (
                batch.response_mask.chunk(2)[0] & batch.response_mask.chunk(2)[1] & (cuts >= config.min_prefix_tokens)
            )
            weights = torch.where(shared, cuts, 0).float()
            mean = (pairwise_loss(cut_chosen, cut_rejected) * weights).sum(1) / weights.sum(1).clamp(min=1)
            # A pair with no shared cut is judged on its whole texts alone.
            share = torch.where(shared.any(dim=1), config.prefix_loss, 0.0)
            loss = (1 - share) * loss + share * mean
        return loss, (chosen > rejected).detach()


def as_markdown(metrics: Mapping[str, float]) -> str:
    return (
        "# Reward model\n\n"
        f"On {metrics['num_heldout_pairs']:.0f} held-out pairs it prefers what people preferred in "
        f"**{metrics['heldout_accuracy']:.1%}** (whole texts; {metrics['heldout_accuracy_cut']:.1%} with both cut to half).\n\n"
        f"Its scores of {metrics['num_calibration_samples']:.0f} responses of the fine-tuned model have mean "
        f"{metrics['reward_mean']:.3f} and standard deviation {metrics['reward_std']:.3f}; PPO normalises by these.\n"
    )
