"""Supervised fine-tuning: the next-token loss on completions; prompts carry no loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.sft import SftStageConfig
from components.rlhf.data.batching import collate, step_batches
from components.rlhf.data.records import Demonstration
from components.rlhf.data.token_files import encode_all
from components.rlhf.data.tokenizer import EncodedText
from components.rlhf.engine.factory import create_engine, max_over_shards, trained_dtype, weight_shards
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.maths.losses import aggregate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.packing import plan_for
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.runtime.training import Batches, TrainingContext, token_counts, train_on_batches
from components.rlhf.text.errors import require_finite

MAX_HELDOUT = 256  # demonstrations that the held-out loss is measured on


class SftTrainer:
    """One run of supervised fine-tuning; `actor` is the trained model."""

    def __init__(self, config: SftStageConfig, base_model: Path, context: TrainingContext) -> None:
        self.config, self.context = config, context
        self.dtype, self.device = compute_dtype(config.model.precision), default_device()
        frozen, lora = config.model.num_frozen_layers, config.model.lora
        training = config.sft.training
        lm = load_causal_lm(
            base_model,
            num_frozen_layers=frozen,
            dtype=self.dtype,
            trainable=lora is None,
            trained_dtype=trained_dtype(training, self.dtype),
            device=self.device,
            shard=weight_shards(training, group=context.group, dtype=self.dtype),
            quantization=config.model.quantization,
        )
        if lora:
            add_adapters(lm, lora, num_frozen_layers=frozen, seed=config.seed)
        if training.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        self.actor = Actor(
            lm,
            num_frozen_layers=frozen,
            dtype=self.dtype,
            max_over_ranks=max_over_shards(training, context.group),
        )
        self.engine: TrainEngine | None = None

    def train(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Demonstration],
        heldout: Sequence[Demonstration],
        *,
        max_tokens: int,
        folder: Path | None = None,
    ) -> dict[str, float]:
        """Take every step that no checkpoint has; return the final metrics. folder is that of the data set, which may have ids."""
        sft, seed = self.config.sft, self.config.seed
        encode = partial(
            encode_all, tokenizer=tokenizer, max_tokens=max_tokens, folder=folder, log=self.context.progress.log
        )
        texts, heldout_texts = encode(train, split="train"), encode(heldout[:MAX_HELDOUT], split="heldout")
        steps = list(
            step_batches(len(texts), sft.batch_size, seed=seed, num_epochs=sft.num_epochs, max_steps=sft.max_steps)
        )
        self.engine = create_engine(
            self.actor, sft.training, num_steps=len(steps), group=self.context.group, dtype=self.dtype
        )

        def shares_of(rows: Sequence[int], batch: Sequence[int]) -> dict[str, Tensor]:
            # The mean over all tokens of answers in the step.
            denominator = sum(texts.num_learned[i] for i in batch)
            loss = self._loss([texts[i] for i in rows], denominator)
            lengths = [texts.num_tokens[i] for i in rows]
            shares = token_counts(lengths, [range(len(rows))], pack_limit=self.actor.pack_limit)
            if self.actor.router_loss is not None:
                shares["router_loss"] = sum(lengths) / sum(texts.num_tokens[i] for i in batch) * self.actor.router_loss
                loss = loss + shares["router_loss"]
            return {"loss": loss} | shares

        batches = Batches(
            records="demonstrations",
            lengths=texts.num_tokens,
            steps=steps,
            max_tokens=sft.training.microbatch_tokens,
            plan=plan_for(self.actor),
        )
        metrics: dict[str, float] = train_on_batches(
            self.context, "actor", self.engine, batches, shares_of,
            lambda: {"heldout_loss_before": self.heldout_loss(heldout_texts)},
        )  # fmt: skip
        self.context.group.watchdog("SFT held-out loss")
        loss = self.heldout_loss(heldout_texts)
        with self.context.checkpoints.named_on_failure():
            # No training loss sees the weights after the last step; this one does.
            require_finite(loss, what="The held-out loss", step=len(steps), batch="all held-out demonstrations")
        self.context.tracker.log({"heldout/loss": loss, "heldout/perplexity": math.exp(loss)}, len(steps))
        return metrics | {
            "heldout_loss": loss,
            "heldout_perplexity": math.exp(loss),
            "num_steps": float(len(steps)),
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights, one at a time. Every rank iterates over all of them."""
        assert self.engine is not None, "train() comes first"
        return self.context.export(self.engine)

    def _loss(self, texts: Sequence[EncodedText], denominator: int) -> Tensor:
        batch = collate(
            [t.prompt_ids for t in texts], [t.response_ids for t in texts], [t.response_mask for t in texts]
        ).to(self.device)
        logprobs, _ = self.actor(batch, SamplingDistribution())
        return aggregate(-logprobs, batch.response_mask, "token-mean", denominator)

    @torch.no_grad()
    def heldout_loss(self, texts: Sequence[EncodedText]) -> float:
        """Mean negative log-likelihood per response token, in nats; 0 when there are no held-out texts."""
        if not texts:
            return 0.0
        denominator = sum(text.num_learned for text in texts)
        local_sum = torch.zeros((), device=self.device)
        lengths, max_tokens = [text.num_tokens for text in texts], self.config.sft.training.microbatch_tokens
        for rows, weight in self.context.microbatches(lengths, max_tokens, plan_for(self.actor)):
            local_sum += weight * self._loss([texts[i] for i in rows], denominator)
        return self.context.group.sum(local_sum).item()


def as_markdown(metrics: Mapping[str, float]) -> str:
    return (
        "# Supervised fine-tuning\n\n"
        "| | before | after |\n|---|---:|---:|\n"
        f"| held-out loss (nats per token) | {metrics['heldout_loss_before']:.3f} | {metrics['heldout_loss']:.3f} |\n"
        f"| held-out perplexity | {math.exp(metrics['heldout_loss_before']):.1f} | {metrics['heldout_perplexity']:.1f} |\n"
    )
