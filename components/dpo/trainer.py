"""Training on preferences: the policy's log-probs of the answers against those of the reference, which are computed once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.dpo.examples import Examples, Mismatches, Texts, batch_of
from components.dpo.losses import Answers, answer_losses, pair_losses, rewards_of
from components.dpo.metrics import History, answer_metrics, heldout_metrics, pair_metrics
from components.dpo.reference import Reference
from components.dpo.states import FrozenStates
from components.rlhf.config.dpo import DpoStageConfig
from components.rlhf.data.batching import step_batches
from components.rlhf.data.microbatches import deal_rows, equal_passes, fill_microbatches
from components.rlhf.engine.factory import create_engine, max_over_shards, trained_dtype, weight_shards
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.maths.kl import estimate_kl
from components.rlhf.maths.preferences import kl_of_mismatches
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.lora import add_adapters
from components.rlhf.models.packing import plan_for
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.runtime.training import Batches, Extras, TrainingContext, token_counts, train_on_batches
from components.rlhf.text.errors import require_finite


class DpoTrainer:
    """One run of training on preferences; `actor` is the trained model, and `history` has the metrics of every step."""

    def __init__(self, config: DpoStageConfig, sft_model: Path, context: TrainingContext) -> None:
        self.config, self.dpo, self.context = config, config.dpo, context
        self.dtype, self.device = compute_dtype(config.model.precision), default_device()
        frozen, lora, training = config.model.num_frozen_layers, config.model.lora, config.dpo.training
        lm = load_causal_lm(
            sft_model,
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
        self.max_over_ranks = max_over_shards(training, context.group)
        self.actor = Actor(lm, num_frozen_layers=frozen, dtype=self.dtype, max_over_ranks=self.max_over_ranks)
        self.states = FrozenStates(self.actor, self.device)
        self.engine: TrainEngine | None = None
        self.reference: Reference | None = None
        self.history: History = []

    def train(self, examples: Examples, heldout: Examples | None, *, max_tokens: int) -> dict[str, float]:
        """Take every step that no checkpoint has; return the final metrics. heldout are pairs, whatever the loss learns from."""
        dpo = self.dpo
        steps = list(
            step_batches(
                len(examples), dpo.batch_size, seed=self.config.seed, num_epochs=dpo.num_epochs, max_steps=dpo.max_steps
            )
        )
        self.engine = create_engine(
            self.actor, dpo.training, num_steps=len(steps), group=self.context.group, dtype=self.dtype
        )
        mismatches = None if dpo.is_paired else Mismatches(examples.texts, steps, max_tokens=max_tokens)
        self._prepare(examples, steps, mismatches, heldout)
        steps_of_run = _Steps(self, examples, mismatches)
        batches = Batches(
            records="pairs" if dpo.is_paired else "labeled answers",
            lengths=examples.num_tokens,
            steps=steps,
            max_tokens=dpo.training.microbatch_tokens,
            plan=fill_microbatches if dpo.is_paired else plan_for(self.actor),
        )
        extras = Extras(
            before=steps_of_run.before,
            after=lambda step, values, state: state["history"].append({"step": step, **values}),
            saved={} if self.reference is None else {"reference": self.reference},
        )
        state = train_on_batches(
            self.context, "actor", self.engine, batches, steps_of_run.shares_of, self._initial_state, extras
        )
        self.history = state["history"]
        return {"num_steps": float(len(steps))} | self._measure(heldout, len(steps))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights, one at a time. Every rank iterates over all of them."""
        assert self.engine is not None, "train() comes first"
        return self.context.export(self.engine)

    def _prepare(
        self,
        examples: Examples,
        steps: Sequence[Sequence[int]],
        mismatches: Mismatches | None,
        heldout: Examples | None,
    ) -> None:
        """Compute the frozen layers, and name the texts of which the reference will be computed."""
        lists: dict[str, Texts] = {"train": examples.texts}
        # What is computed together, by all ranks: records of a step, and the texts of each record.
        parts: dict[str, list[list[list[int]]]] = {"train": [[examples.texts_of([i]) for i in step] for step in steps]}
        if mismatches is not None:
            lists["mismatched"] = mismatches
            parts["mismatched"] = [[[row] for row in mismatches.of_step(n)] for n in range(1, len(steps) + 1)]
        if heldout is not None:
            lists["heldout"] = heldout.texts
            parts["heldout"] = [[heldout.texts_of([record]) for record in range(len(heldout))]]
        own: dict[str, list[int]] = {}
        for name, texts in lists.items():
            found: set[int] = set()
            for part in parts[name]:
                lengths = [sum(texts.num_tokens[row] for row in record) for record in part]
                dealt = deal_rows(lengths, self.context.group.world_size)[self.context.group.rank]
                found.update(row for index in dealt for row in part[index])
            own[name] = sorted(found)
        tokens = self.dpo.training.microbatch_tokens
        self.states.compute(lists, own, self.context, max_tokens=tokens)
        if self.dpo.has_reference:
            used = {name: sorted({r for part in parts[name] for record in part for r in record}) for name in lists}
            self.reference = Reference(lists, used, self.context)

    def answers(
        self, name: str, texts: Texts, rows: Sequence[int]
    ) -> tuple[Answers, Tensor, Tensor | None, list[list[int]]]:
        """The texts `rows` of a list: their log-probs, the KL of each, the router's loss (mean over all tokens), and the passes.

        The KL [N] between policy and reference in nats is estimated at the tokens of each text, which neither has sampled: half the
        squared log-ratio of a token (k2 of Schulman 2020) is small wherever they agree. The unbiased k1 and k3 would be dominated by
        single tokens that are likelier in the data than in both. It is 0 without a reference.
        """
        own = [texts[row] for row in rows]
        lengths = [text.num_tokens for text in own]
        logprobs, refs, kl = (torch.zeros(len(rows), device=self.device) for _ in range(3))
        router_loss: Tensor | None = None
        tokens = self.dpo.training.microbatch_tokens
        passes = equal_passes(lengths, tokens, self.max_over_ranks, plan_for(self.actor))
        for indices, weight in passes:
            batch = batch_of([own[i] for i in indices]).to(self.device)
            places, mask = torch.tensor(indices, device=self.device), batch.response_mask
            found, _ = self.actor(batch, SamplingDistribution(), self.states.of(name, [rows[i] for i in indices]))
            logprobs = logprobs.index_put((places,), weight * found.sum(1), accumulate=True)
            if self.reference is not None and weight:
                ref = self.reference.of(name, [rows[i] for i in indices], mask)
                refs[places] = ref.sum(1)
                kl[places] = estimate_kl(found.detach(), ref, mask, "k2").sum(1)
            if self.actor.router_loss is not None:
                share = weight * float(batch.lengths.sum()) / sum(lengths) * self.actor.router_loss
                router_loss = share if router_loss is None else router_loss + share
        sizes = torch.tensor([text.num_learned for text in own], device=self.device)
        answers = Answers(logprobs=logprobs, ref_logprobs=refs, lengths=sizes)
        return answers, kl, router_loss, [indices for indices, _ in passes]

    def _initial_state(self) -> dict[str, Any]:
        if self.reference is not None:
            max_tokens = self.dpo.reference_microbatch_tokens or self.dpo.training.microbatch_tokens
            self.reference.compute(self.actor, self.states, self.device, max_tokens=max_tokens)
        return {"history": []}

    @torch.no_grad()
    def _measure(self, heldout: Examples | None, step: int) -> dict[str, float]:
        """Loss (not of kto), accuracy, margin and KL on the held-out pairs."""
        if heldout is None:
            return {}
        self.context.group.watchdog("held-out pairs")
        sums: dict[str, Tensor] = {}
        parts = self.context.microbatches(heldout.num_tokens, self.dpo.training.microbatch_tokens, fill_microbatches)
        for pairs, weight in parts:
            answers, kl, _, _ = self.answers("heldout", heldout.texts, heldout.texts_of(pairs))
            for metric, total in heldout_metrics(self.dpo, answers, kl, num_pairs=len(heldout)).items():
                sums[metric] = sums.get(metric, 0) + weight * total
        totals = self.context.group.sum(torch.stack(list(sums.values()))).tolist()
        numbers = dict(zip(sums, totals, strict=True))
        with self.context.checkpoints.named_on_failure():
            # No training loss sees the weights after the last step; this one does.
            for metric, value in numbers.items():
                require_finite(value, what=f"The held-out {metric}", step=step, batch="all held-out pairs")
        self.context.tracker.log({f"heldout/{metric}": value for metric, value in numbers.items()}, step)
        return {f"heldout_{metric}": value for metric, value in numbers.items()} | {
            "num_heldout_pairs": float(len(heldout))
        }


class _Steps:
    """The optimizer steps of a run, each with KTO's estimate of the KL."""

    def __init__(self, trainer: DpoTrainer, examples: Examples, mismatches: Mismatches | None) -> None:
        self.trainer, self.examples, self.mismatches = trainer, examples, mismatches
        self.kl = torch.zeros((), device=trainer.device)  # of the current step

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Estimate the KL of KTO over the mismatched answers of the step, of which each rank computes a share."""
        if self.mismatches is None:
            return
        trainer, own = self.trainer, self.mismatches.of_step(step)
        lengths = [self.mismatches.num_tokens[row] for row in own]
        total = torch.zeros((), device=trainer.device)
        max_tokens = trainer.dpo.training.microbatch_tokens
        for rows, weight in trainer.context.microbatches(lengths, max_tokens, plan_for(trainer.actor)):
            answers, *_ = trainer.answers("mismatched", self.mismatches, [own[row] for row in rows])
            total += weight * answers.log_ratios.sum()
        self.kl = kl_of_mismatches(trainer.context.group.sum(total), len(own))

    def shares_of(self, rows: Sequence[int], batch: Sequence[int]) -> dict[str, Tensor]:
        """What these records add to the means over their step."""
        trainer, examples, config = self.trainer, self.examples, self.trainer.dpo
        texts = examples.texts_of(rows)
        answers, kl, router_loss, passes = trainer.answers("train", examples.texts, texts)
        rewards = rewards_of(config, answers)
        if examples.labels is None:
            losses = pair_losses(config, answers)
            shares = pair_metrics(answers, rewards, num_pairs=len(batch))
        else:
            labels = torch.tensor([examples.labels[row] for row in rows], device=trainer.device)
            losses = answer_losses(config, answers, labels, self.kl)
            num_desirable = sum(examples.labels[row] for row in batch)
            threshold = config.strength * self.kl
            shares = answer_metrics(
                answers, rewards, labels, threshold, num_answers=len(batch), num_desirable=num_desirable
            )
            shares["kl/mismatched"] = self.kl * len(rows) / len(batch)
        shares = {"loss": losses.sum() / len(batch)} | shares
        if trainer.reference is not None:
            shares["kl"] = kl.sum() / (len(batch) * examples.texts_per_record)
        if router_loss is not None:
            shares["router_loss"] = router_loss * len(rows) / len(batch)
            shares["loss"] = shares["loss"] + shares["router_loss"]
        lengths = [examples.texts.num_tokens[text] for text in texts]
        return shares | token_counts(lengths, passes, pack_limit=trainer.actor.pack_limit)
