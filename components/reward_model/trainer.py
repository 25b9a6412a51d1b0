"""Reward-model training: the chosen text scores above the rejected one, whole and cut short."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.batching import TokenBatch, collate, step_batches
from components.rlhf.data.microbatches import equal_passes, fill_microbatches
from components.rlhf.data.records import PreferencePair
from components.rlhf.data.token_files import encode_all
from components.rlhf.data.tokenizer import EncodedText
from components.rlhf.engine.factory import create_engine, max_over_shards, trained_dtype, weight_shards
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.maths.losses import pairwise_loss
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.packing import plan_for
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.runtime.training import Batches, TrainingContext, token_counts, train_on_batches


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    chosen: EncodedText
    rejected: EncodedText
    margin: float


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """N pairs as 2N texts, first the chosen and then the rejected ones, T the longest completion."""

    batch: TokenBatch
    scores: Tensor  # [2N, T], column t is cut after t + 1 completion tokens
    margins: Tensor  # [N]
    router_loss: Tensor | None  # of a mixture of experts, the mean over all tokens
    passes: list[list[int]]  # texts of each forward pass


class RewardModelTrainer:
    """One run of reward-model training; `model` is the trained model."""

    def __init__(self, config: RewardModelStageConfig, start: Path, context: TrainingContext) -> None:
        self.config, self.context = config, context
        self.dtype, self.device = compute_dtype(config.model.precision), default_device()
        frozen, lora, training = config.model.num_frozen_layers, config.model.lora, config.reward_model.training
        lm = load_scalar_lm(
            start,
            num_frozen_layers=frozen,
            dtype=self.dtype,
            trainable=lora is None,
            seed=config.seed,
            trained_dtype=trained_dtype(training, self.dtype),
            device=self.device,
            shard=weight_shards(training, group=context.group, dtype=self.dtype),
            quantization=config.model.quantization,
        )
        if lora:
            add_adapters(lm, lora, num_frozen_layers=frozen, seed=config.seed)
        if training.gradient_checkpointing:
            enable_gradient_checkpointing(lm)
        self.model = ScalarModel(lm, num_frozen_layers=frozen, dtype=self.dtype)
        self.max_over_ranks = max_over_shards(training, context.group)
        self.engine: TrainEngine | None = None

    def train(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[PreferencePair],
        *,
        max_tokens: int,
        folder: Path | None = None,
    ) -> dict[str, float]:
        """Take every step that no checkpoint has; return the number of steps. folder is that of the data set, which may have ids."""
        config, seed = self.config.reward_model, self.config.seed
        texts = encode_all(
            pairs, tokenizer, max_tokens=max_tokens, folder=folder, split="train", log=self.context.progress.log
        )
        lengths = [sum(texts.num_tokens[2 * i : 2 * i + 2]) for i in range(len(pairs))]
        margins = [self.margin_of(pair) for pair in pairs]
        steps = list(
            step_batches(
                len(pairs), config.batch_size, seed=seed, num_epochs=config.num_epochs, max_steps=config.max_steps
            )
        )
        self.engine = create_engine(
            self.model, config.training, num_steps=len(steps), group=self.context.group, dtype=self.dtype
        )

        def shares_of(rows: Sequence[int], batch: Sequence[int]) -> dict[str, Tensor]:
            scored = self.score_prefixes(
                [EncodedPair(chosen=texts[2 * i], rejected=texts[2 * i + 1], margin=margins[i]) for i in rows]
            )
            losses, is_correct = self.losses(scored)
            shares = {"loss": losses.sum() / len(batch), "accuracy": is_correct.sum() / len(batch)}
            if scored.router_loss is not None:
                shares["router_loss"] = scored.router_loss * len(rows) / len(batch)
                shares["loss"] = shares["loss"] + shares["router_loss"]
            return shares | token_counts(scored.batch.lengths.tolist(), scored.passes, pack_limit=self.model.pack_limit)

        batches = Batches(
            records="pairs",
            lengths=lengths,
            steps=steps,
            max_tokens=config.training.microbatch_tokens,
            plan=fill_microbatches,
        )
        train_on_batches(self.context, "reward_model", self.engine, batches, shares_of)
        self.context.group.watchdog("reward model, final measurements")
        return {"num_steps": float(len(steps))}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights, one at a time. Every rank iterates over all of them."""
        assert self.engine is not None, "train() comes first"
        return self.context.export(self.engine)

    def margin_of(self, pair: PreferencePair) -> float:
        return pair.margin or 0.0 if self.config.reward_model.use_margin else 0.0

    def score_prefixes(self, pairs: Sequence[EncodedPair]) -> ScoredPairs:
        """Score both texts of N pairs at every cut. Texts of similar length share a forward pass, whichever pair they are of."""
        texts = [p.chosen for p in pairs] + [p.rejected for p in pairs]
        batch = collate([t.prompt_ids for t in texts], [t.response_ids for t in texts]).to(self.device)
        lengths, max_tokens = batch.lengths.tolist(), self.config.reward_model.training.microbatch_tokens
        passes = equal_passes(lengths, max_tokens, self.max_over_ranks, plan_for(self.model))
        scores = torch.zeros(batch.response_mask.shape, device=self.device)
        router_loss: Tensor | None = None
        for indices, weight in passes:
            rows = torch.tensor(indices, device=self.device)
            part = batch.select(rows)
            found = weight * self.model.prefix_scores(part)
            scores = scores.index_put((rows[:, None], torch.arange(found.shape[1], device=self.device)), found, True)
            if self.model.router_loss is not None:
                share = weight * float(part.lengths.sum()) / sum(lengths)
                router_loss = share * self.model.router_loss + (0 if router_loss is None else router_loss)
        return ScoredPairs(
            batch=batch,
            scores=scores,
            margins=torch.tensor([p.margin for p in pairs], device=self.device),
            router_loss=router_loss,
            passes=[indices for indices, _ in passes],
        )

    def losses(self, scored: ScoredPairs) -> tuple[Tensor, Tensor]:
        """Loss of each pair, and whether its chosen text scores higher: both [N].

        prefix_loss w mixes two comparisons: (1 - w) of the whole texts, and w of both texts cut after the same number of
        completion tokens, averaged over all cuts that both texts reach, weighted by length. Without the second, a text
        without EOS is out of distribution, and PPO learns not to stop: the score of a human text rises when its EOS is removed.
        """
        config, batch, scores_at_cut = self.config.reward_model, scored.batch, scored.scores
        whole = scores_at_cut.gather(1, (batch.response_lengths - 1)[:, None]).squeeze(1)
        chosen, rejected = whole.chunk(2)
        loss = pairwise_loss(chosen, rejected, scored.margins)
        if config.prefix_loss > 0:
            chosen_mask, rejected_mask = batch.response_mask.chunk(2)
            lengths = torch.arange(1, scores_at_cut.shape[1] + 1, device=self.device)
            shared = chosen_mask & rejected_mask & (lengths >= config.min_prefix_tokens)
            weights = torch.where(shared, lengths, 0).float()
            mean = (pairwise_loss(*scores_at_cut.chunk(2)) * weights).sum(1) / weights.sum(1).clamp(min=1)
            # A pair without a shared cut is trained on its whole texts alone.
            share = torch.where(shared.any(dim=1), config.prefix_loss, 0.0)
            loss = (1 - share) * loss + share * mean
        return loss, (chosen > rejected).detach()
