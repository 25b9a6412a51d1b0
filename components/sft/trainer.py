"""Supervised fine-tuning: the next-token loss on completions, prompts masked."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.sft import SftStageConfig
from components.rlhf.data.batching import TokenBatch, collate, local_microbatches, num_steps, step_batches
from components.rlhf.data.records import Demonstration
from components.rlhf.data.tokenizer import EncodedText, encode_text
from components.rlhf.engine.factory import create_engine, shards_weights
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.losses import aggregate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import collect_weights, load_causal_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.text.errors import require_finite
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import Tracker

MAX_HELDOUT = 256  # demonstrations behind the held-out loss


class SftTrainer:
    """One run of fine-tuning; `actor` is the result."""

    def __init__(
        self,
        config: SftStageConfig,
        base_model: Path,
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
        lm = load_causal_lm(base_model, num_frozen_layers=frozen, dtype=self.dtype, trainable=lora is None)
        if lora:
            add_adapters(lm, lora, num_frozen_layers=frozen, seed=config.seed)
        if not shards_weights(config.sft.training):
            lm.to(self.device)
        if config.sft.training.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        self.actor = Actor(lm, num_frozen_layers=frozen, dtype=self.dtype)
        self.engine: TrainEngine | None = None

    def train(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Demonstration],
        heldout: Sequence[Demonstration],
        *,
        max_tokens: int,
    ) -> dict[str, float]:
        """Train on every batch once more than the last checkpoint had seen; return the final metrics."""
        sft = self.config.sft
        texts = [encode_text(tokenizer, d.prompt, d.completion, max_tokens=max_tokens) for d in train]
        heldout_texts = [
            encode_text(tokenizer, d.prompt, d.completion, max_tokens=max_tokens) for d in heldout[:MAX_HELDOUT]
        ]
        total = num_steps(len(texts), sft.batch_size, num_epochs=sft.num_epochs, max_steps=sft.max_steps)
        engine = create_engine(self.actor, sft.training, num_steps=total, group=self.group, dtype=self.dtype)
        self.engine = engine
        state = self.checkpoints.restore({"actor": engine})
        done = int(state["step"]) if state else 0
        metrics = {"heldout_loss_before": self.heldout_loss(heldout_texts)} if not state else dict(state["metrics"])
        if state:
            self.progress.log(f"resuming after step {done} from {self.checkpoints.latest}")
        batches = step_batches(
            len(texts), sft.batch_size, seed=self.config.seed, num_epochs=sft.num_epochs, max_steps=sft.max_steps
        )
        for step, indices in enumerate(batches, start=1):
            if step <= done:
                continue
            self.group.watchdog(f"SFT step {step}")
            values = self._step(engine, [texts[i] for i in indices], step, indices)
            self.tracker.log(values, step)
            self.progress.step(step, total, {"loss": values["train/loss"]})
            if self.checkpoints.should_save():
                self.tracker.flush()
                self.checkpoints.save(step, {"actor": engine}, {"metrics": metrics})
        self.group.watchdog("SFT held-out loss")
        loss = self.heldout_loss(heldout_texts)
        # No loss of training sees what the last step did to the weights; this one does.
        require_finite(
            loss,
            name="The held-out loss",
            step=total,
            batch="all held-out demonstrations",
            checkpoint=self.checkpoints.latest,
        )
        self.tracker.log({"heldout/loss": loss, "heldout/perplexity": math.exp(loss)}, total)
        return metrics | {"heldout_loss": loss, "heldout_perplexity": math.exp(loss), "num_steps": float(total)}

    def weights(self) -> dict[str, Tensor]:
        """The trained weights in main memory of the first process; every process calls it."""
        assert self.engine is not None, "train() comes first"
        return collect_weights(self.engine.full_weights(), keep=self.group.rank == 0)

    def _step(self, engine: TrainEngine, texts: list[EncodedText], step: int, indices: list[int]) -> dict[str, float]:
        """One optimiser step over its microbatches; the loss is the mean over all response tokens of the step."""
        denominator = sum(len(text.response_ids) for text in texts)
        parts = self._local_microbatches(texts)
        own = torch.zeros((), device=self.device)
        for number, (rows, weight) in enumerate(parts, start=1):
            loss = weight * self._loss([texts[i] for i in rows], denominator)
            own += loss.detach()
            engine.backward(loss, last=number == len(parts))
        total = self.group.sum(own).item()
        info = engine.step()
        for what, value in (("The loss", total), ("The gradient", info.grad_norm)):
            require_finite(
                value, name=what, step=step, batch=f"demonstrations {indices}", checkpoint=self.checkpoints.latest
            )
        return {"train/loss": total, "train/grad_norm": info.grad_norm, "train/learning_rate": info.learning_rate}

    def _local_microbatches(self, texts: Sequence[EncodedText]) -> list[tuple[list[int], float]]:
        return local_microbatches(
            [text.num_tokens for text in texts],
            self.config.sft.training.microbatch_tokens,
            rank=self.group.rank,
            world_size=self.group.world_size,
            max_over_ranks=self.group.max_int,
        )

    def _loss(self, texts: Sequence[EncodedText], denominator: int) -> torch.Tensor:
        batch: TokenBatch = collate([t.prompt_ids for t in texts], [t.response_ids for t in texts]).to(self.device)
        logprobs, _ = self.actor(batch, SamplingDistribution())
        return aggregate(-logprobs, batch.response_mask, "token-mean", denominator)

    @torch.no_grad()
    def heldout_loss(self, texts: Sequence[EncodedText]) -> float:
        """Mean negative log-likelihood per response token, in nats; 0 when there are no held-out texts."""
        if not texts:
            return 0.0
        denominator = sum(len(t.response_ids) for t in texts)
        own = torch.zeros((), device=self.device)
        for rows, weight in self._local_microbatches(texts):
            own += weight * self._loss([texts[i] for i in rows], denominator)
        return self.group.sum(own).item()


def as_markdown(metrics: Mapping[str, float]) -> str:
    return (
        "# Supervised fine-tuning\n\n"
        "| | before | after |\n|---|---:|---:|\n"
        f"| held-out loss (nats per token) | {metrics['heldout_loss_before']:.3f} | {metrics['heldout_loss']:.3f} |\n"
        f"| held-out perplexity | {math.exp(metrics['heldout_loss_before']):.1f} | {metrics['heldout_perplexity']:.1f} |\n"
    )
