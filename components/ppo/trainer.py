"""The PPO loop: sample, score and update, until the iterations are over or the validation objective has converged."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from operator import itemgetter
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from components.ppo.experience import Experience, Learner, Models, make_experience, response_rewards, score
from components.ppo.metrics import History, rollout_metrics
from components.ppo.update import update
from components.rlhf.config.ppo import GROUP_ESTIMATORS, PpoConfig, PpoStageConfig
from components.rlhf.data.batching import collate, stream_slice
from components.rlhf.data.microbatches import deal_rows
from components.rlhf.data.records import Completion, Prompt, ValidationSample
from components.rlhf.engine.factory import create_engine
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.maths.kl import adapt_kl_coef
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.rollout.controls import sampling_distribution
from components.rlhf.rollout.probe import SyncCheck, probe_ids
from components.rlhf.rollout.protocol import RolloutEngine
from components.rlhf.runtime.memory import release_freed_memory
from components.rlhf.runtime.training import TrainingContext


class PpoTrainer:
    """One run of PPO. All randomness follows from the seed and the iteration, so that a resumed run repeats it exactly."""

    def __init__(
        self, config: PpoStageConfig, models: Models, rollout: RolloutEngine, context: TrainingContext
    ) -> None:
        self.config, self.ppo, self.rollout = config, config.ppo, rollout
        self.context, self.group, self.checkpoints = context, context.group, context.checkpoints
        self.progress, self.tracker = context.progress, context.tracker
        sampling = self.ppo.rollout.sampling
        self.rollout_batch = self.ppo.rollout.num_prompts * self.ppo.rollout.samples_per_prompt
        self.learner = Learner(
            models=models,
            config=self.ppo,
            distribution=sampling_distribution(sampling, rollout.stop_ids),
            group=self.group,
            engines=create_engines(models, self.ppo, self.group),
        )
        self.varying_lengths = sampling.min_new_tokens < sampling.max_new_tokens
        self.sync_check = SyncCheck(models.actor.dtype)
        self.kl_coef = self.ppo.kl_coef
        self.history: History = []
        self.validation: list[ValidationSample] = []
        self.evals_without_improvement = 0
        self.best_objective = float("-inf")

    def train(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> History:
        """Run every iteration that no checkpoint has; return one row of metrics per iteration.

        Validation takes as many prompts as the ranks can share equally, because all of them run as many forward passes.
        """
        validation = validation[: len(validation) // self.group.world_size * self.group.world_size]
        if self.ppo.eval_every and not validation:
            self.progress.log(
                f"no validation: there are fewer validation prompts than processes ({self.group.world_size})"
            )
        first = self._restore() + 1
        if self.config.model.lora:
            reason = self.rollout.merges_because
            self.progress.log(f"weight sync: {f'all weights, because {reason}' if reason else 'adapters only'}")
        if first == 1 and self.config.model.quantization:
            self._sync()  # the rollout engine has loaded the artifact
        self._check_sync()
        if first == 1 and self.ppo.eval_every and validation:
            self.tracker.log(self._validate(validation, 0), 0)  # the SFT model, before the first update
        for iteration in range(first, self.ppo.num_iterations + 1):
            # Checked before the iteration: a run that crashed after it had converged stays converged when it is resumed.
            if self.ppo.patience and self.evals_without_improvement >= self.ppo.patience:
                self.progress.log(f"converged: no improvement in {self.ppo.patience} evaluations")
                break
            with self.checkpoints.named_on_failure():
                row = self._iterate(iteration, prompts)
            if self.varying_lengths:
                release_freed_memory()
            if self.ppo.eval_every and iteration % self.ppo.eval_every == 0 and validation:
                row |= self._validate(validation, iteration)
            self.history.append(row)
            self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, iteration)
            shown = {"score": row["score/mean"], "kl": row["kl/sequence"], "length": row["response/length"]}
            self.progress.step(iteration, self.ppo.num_iterations, shown, unit="iteration")
            if self.checkpoints.should_save():
                self._save(iteration)
        return self.history

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The actor's weights, one at a time. Every rank iterates over all of them."""
        return self.context.export(self.learner.engines["actor"])

    def _iterate(self, iteration: int, prompts: Sequence[Prompt]) -> dict[str, float]:
        started = time.monotonic()
        batch = [p for p in self._prompts_of(iteration, prompts) for _ in range(self.ppo.rollout.samples_per_prompt)]
        rows = local_rows(len(batch), self.ppo.minibatch, self.group)
        self.group.watchdog(f"PPO iteration {iteration}, rollout")
        seeds = [derive_seed("rollout", self.config.seed, iteration, row) for row in rows]
        completions = self.rollout.generate([batch[row] for row in rows], self.ppo.rollout.sampling, seeds)
        if self.ppo.advantage == "remax":
            completions = self._with_baselines(completions)
        group_size = self.ppo.rollout.samples_per_prompt if self.ppo.advantage in GROUP_ESTIMATORS else 1
        completions = share_rollout(rows, completions, self.ppo.minibatch, self.group, group_size=group_size)
        generated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, scoring")
        experience = make_experience(self.learner, completions, kl_coef=self.kl_coef, group_size=group_size)
        scored = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, update")
        losses = update(self.learner, experience, seed=self.config.seed, iteration=iteration)
        updated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, weight sync")
        self._sync()
        metrics = rollout_metrics(experience, self.group)
        row = {"iteration": float(iteration), **metrics, **losses, "kl/coef": self.kl_coef}
        if self.ppo.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                row["kl/sequence"],
                target=self.ppo.kl_target,
                horizon=self.ppo.kl_horizon,
                num_samples=len(batch),
            )
        return row | {
            "seconds/generate": generated - started,
            "seconds/score": scored - generated,
            "seconds/update": updated - scored,
            "seconds/sync": time.monotonic() - updated,
        }

    def _with_baselines(self, completions: Sequence[Completion]) -> list[Completion]:
        """The completions with the reward of the greedy response to each of their prompts (Li et al. 2023, ReMax)."""
        prompts = {tuple(completion.prompt_ids): completion.prompt for completion in completions}
        greedy = self.rollout.generate(
            list(prompts.values()), self.ppo.rollout.sampling, [0] * len(prompts), greedy=True
        )
        truncated = torch.tensor([completion.truncated for completion in greedy])
        rewards, _ = response_rewards(score(self.learner, greedy).cpu(), truncated, self.ppo)
        baselines = dict(zip(prompts, rewards.tolist(), strict=True))
        return [replace(c, baseline=baselines[tuple(c.prompt_ids)]) for c in completions]

    def _prompts_of(self, iteration: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of one iteration: consecutive slices of a stream of shuffled epochs."""
        size = self.ppo.rollout.num_prompts
        rows = stream_slice(len(prompts), (iteration - 1) * size, size, seed=self.config.seed)
        return [prompts[row] for row in rows]

    def _validate(self, validation: Sequence[Prompt], iteration: int) -> dict[str, float]:
        """Sample the validation prompts with the current policy. The objective is the mean score minus its KL cost."""
        self.group.watchdog(f"PPO evaluation after iteration {iteration}")
        rows = range(self.group.rank, len(validation), self.group.world_size)
        # The same draws in every evaluation of every run, so that only the policy differs.
        seeds = [derive_seed("validation", 0, row) for row in rows]
        completions = self.rollout.generate([validation[row] for row in rows], self.ppo.rollout.sampling, seeds)
        experience = make_experience(self.learner, completions, kl_coef=0.0)
        self.validation += self.group.gather(self._samples(iteration, completions, experience))
        metrics = rollout_metrics(experience, self.group)
        objective = metrics["score/mean"] - self.kl_coef * metrics["kl/sequence"]
        self.evals_without_improvement = 0 if objective > self.best_objective else self.evals_without_improvement + 1
        self.best_objective = max(objective, self.best_objective)
        return {f"validation/{name}": value for name, value in metrics.items()} | {"validation/objective": objective}

    def _samples(
        self, iteration: int, completions: Sequence[Completion], experience: Experience
    ) -> list[ValidationSample]:
        return [
            ValidationSample(
                iteration=iteration,
                num_rollouts=iteration * self.rollout_batch,
                prompt=completion.prompt,
                prompt_ids=completion.prompt_ids,
                response_ids=completion.response_ids,
                response=completion.response,
                truncated=completion.truncated,
                score=score,
                kl=kl,
            )
            for completion, score, kl in zip(
                completions, experience.scores.tolist(), experience.kl.sum(dim=1).tolist(), strict=True
            )
        ]

    def _sync(self) -> None:
        weights = self.learner.engines["actor"].full_weights()
        actor = self.learner.models.actor
        if self.rollout.merges_because or not self.config.model.lora:
            stream = actor.export_weights(weights)
        else:
            # The engine has loaded the artifact, whose weights are those below the adapters unless they were quantized only now.
            is_first = self.rollout.version == 0
            stream = actor.export_adapters(weights, with_base=is_first and self.config.model.quantization is not None)
        self.rollout.sync(self.sync_check.observe(stream))
        self._check_sync()

    @torch.no_grad()
    def _check_sync(self) -> None:
        """Compare weights, and log-probs of a fixed text, of trainer and rollout engine; only rounding may differ."""
        actor, ids = self.learner.models.actor, probe_ids(self.rollout.tokenizer)
        batch = collate([ids[:1]], [ids[1:]]).to(next(actor.parameters()).device)
        trainer_logprobs, _ = actor(batch, SamplingDistribution())
        self.sync_check.check(
            self.rollout.weight_samples(),
            self.rollout.prompt_logprobs(ids),
            trainer_logprobs[0],
            version=self.rollout.version,
        )

    def _save(self, iteration: int) -> None:
        state: dict[str, Any] = {
            "kl_coef": self.kl_coef,
            "history": self.history,
            "validation": [asdict(sample) for sample in self.validation],
            "evals_without_improvement": self.evals_without_improvement,
            "best_objective": self.best_objective if self.history and self.best_objective > float("-inf") else None,
        }
        self.tracker.flush()
        self.checkpoints.save(iteration, self.learner.engines, state)

    def _restore(self) -> int:
        """Load the latest checkpoint, if there is one; return the last iteration that is done."""
        state = self.checkpoints.restore(self.learner.engines)
        if state is None:
            return 0
        self.kl_coef, self.history = state["kl_coef"], state["history"]
        self.validation = TypeAdapter(list[ValidationSample]).validate_python(state["validation"])
        self.evals_without_improvement = state["evals_without_improvement"]
        self.best_objective = float("-inf") if state["best_objective"] is None else state["best_objective"]
        self._sync()
        self.progress.log(f"resuming after iteration {state['step']} from {self.checkpoints.latest}")
        return int(state["step"])


def create_engines(models: Models, ppo: PpoConfig, group: Group) -> dict[str, TrainEngine]:
    """The engines of the trained models. Those of the actor take no steps in critic.warmup_iterations."""
    steps = ppo.num_epochs * ppo.rollout.num_prompts * ppo.rollout.samples_per_prompt // ppo.minibatch
    actor_iterations = ppo.num_iterations - ppo.critic.warmup_iterations
    engines = {
        "actor": create_engine(
            models.actor, ppo.training, num_steps=actor_iterations * steps, group=group, dtype=models.actor.dtype
        )
    }
    if models.critic is not None:
        own = {"learning_rate": ppo.critic.learning_rate}
        own |= {
            name: value for name in ("schedule", "warmup_fraction") if (value := getattr(ppo.critic, name)) is not None
        }
        training = ppo.training.model_copy(update=own)
        engines["critic"] = create_engine(
            models.critic, training, num_steps=ppo.num_iterations * steps, group=group, dtype=models.critic.dtype
        )
    return engines


def local_rows(total: int, minibatch: int, group: Group) -> list[int]:
    """Rows of a rollout that this rank samples: its equal share of every minibatch."""
    share = minibatch // group.world_size
    return [row for row in range(total) if row % minibatch // share == group.rank]


def share_rollout(
    rows: Sequence[int], completions: Sequence[Completion], minibatch: int, group: Group, *, group_size: int = 1
) -> list[Completion]:
    """The completions that this rank trains on: of every minibatch as many as each other rank, with nearly as many tokens.

    completions are those of the rows (of the whole rollout) that this rank has sampled; each group_size neighbors in the rollout
    stay together. The result is in the order of the minibatches, and in each of them in the order of lengths.
    """
    rollout = [
        completion
        for _, completion in sorted(group.gather(list(zip(rows, completions, strict=True))), key=itemgetter(0))
    ]
    own = []
    for start in range(0, len(rollout), minibatch):
        part = rollout[start : start + minibatch]
        groups = [part[first : first + group_size] for first in range(0, len(part), group_size)]
        lengths = [sum(len(c.prompt_ids) + len(c.response_ids) for c in members) for members in groups]
        own += [
            completion for index in deal_rows(lengths, group.world_size)[group.rank] for completion in groups[index]
        ]
    return own
