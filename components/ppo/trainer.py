"""The PPO loop: sample, score and update, until the iterations are over, the validation objective has converged, or the guard stops."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from components.ppo.experience import Learner, Models, make_experience, response_rewards, score
from components.ppo.guard import Guard
from components.ppo.keep import Keeper, Outcome
from components.ppo.metrics import History, experience_metrics
from components.ppo.ptx import load_demonstrations
from components.ppo.reference import MovingReference
from components.ppo.sync import WeightSync
from components.ppo.update import update
from components.ppo.validation import Evaluation, objective_of, validate
from components.rlhf.config.ppo import GROUP_ESTIMATORS, PpoConfig, PpoStageConfig
from components.rlhf.data.batching import stream_slice
from components.rlhf.data.microbatches import deal_rows
from components.rlhf.data.records import Completion, Prompt, ValidationSample
from components.rlhf.engine.factory import create_engine
from components.rlhf.engine.protocol import Group, Saved, TrainEngine
from components.rlhf.environments.play import Player
from components.rlhf.maths.kl import adapt_kl_coef
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.rewards.rewards import Rewards
from components.rlhf.rollout.controls import sampling_distribution
from components.rlhf.rollout.protocol import RolloutEngine, Sampler
from components.rlhf.runtime.memory import release_freed_memory
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.text.errors import NonFiniteError
from components.rlhf.tracking.tables import response_rows


class PpoTrainer:
    """One run of PPO. All randomness follows from the seed and the iteration, so that a resumed run repeats it exactly."""

    def __init__(
        self,
        config: PpoStageConfig,
        models: Models,
        rewards: Rewards,
        rollout: RolloutEngine,
        context: TrainingContext,
        *,
        demonstrations: Path | None = None,
        player: Player | None = None,
    ) -> None:
        """player samples responses of several turns from rollout; None for those of a single turn."""
        self.config, self.ppo, self.rollout = config, config.ppo, rollout
        self.sampler: Sampler = player or rollout
        self.context, self.group, self.checkpoints = context, context.group, context.checkpoints
        self.progress, self.tracker = context.progress, context.tracker
        sampling = self.ppo.rollout.sampling
        self.rollout_batch = self.ppo.rollout.num_prompts * self.ppo.rollout.samples_per_prompt
        self.learner = Learner(
            models=models,
            rewards=rewards,
            config=self.ppo,
            distribution=sampling_distribution(sampling, rollout.stop_ids),
            group=self.group,
            demonstrations=load_demonstrations(
                demonstrations, config, models.actor, rollout.tokenizer, self.group, context.progress.log
            ),
            engines=create_engines(models, self.ppo, self.group),
        )
        self.varying_lengths = sampling.min_new_tokens < sampling.max_new_tokens
        actor = self.learner.engines["actor"]
        self.reference = MovingReference(models.reference, actor, self.ppo.reference, rank=self.group.rank)
        self.saved: dict[str, Saved] = dict(self.learner.engines)  # parts of a checkpoint
        if self.ppo.reference.update_every:
            self.saved["reference"] = self.reference
        self.sync = WeightSync(config, models.actor, actor, rollout)
        self.kl_coef = self.ppo.kl_coef
        self.history: History = []
        self.validation: list[ValidationSample] = []
        self.guard = Guard(self.ppo.guard, context, self.learner.engines, max_kl=config.max_kl)
        self.keeper = Keeper(config, context, actor)
        self.outcome = Outcome()

    def train(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> History:
        """Run every iteration that no checkpoint has, and load the policy to be exported; return one row of metrics per iteration."""
        self.learner.rewards.check_prompts([*prompts, *validation])
        self.keeper.start(validation)
        first = self._restore() + 1
        if self.config.model.lora:
            reason = self.rollout.merges_because
            self.progress.log(f"weight sync: {f'all weights, because {reason}' if reason else 'adapters only'}")
        if first == 1 and self.config.model.quantization:
            self.sync.send()  # the rollout engine has loaded the artifact
        self.sync.check()
        evaluates = self.ppo.eval_every > 0 and len(validation) > 0
        if first == 1 and evaluates:
            with self.checkpoints.named_on_failure():
                self.tracker.log(self._evaluate(validation, 0), 0)  # the SFT model, before the first update
        for iteration in range(first, self.ppo.num_iterations + 1):
            # Checked before the iteration: a run that crashed after it had converged stays converged when it is resumed.
            if self.keeper.has_converged:
                self.progress.log(f"converged: no improvement in {self.ppo.patience} evaluations")
            if self.keeper.has_converged or self.guard.stopped:
                break
            with self.checkpoints.named_on_failure():
                row = self._iterate(iteration, prompts)
                if self.varying_lengths:
                    release_freed_memory()
                # While only the critic is trained, the policy is the SFT model, which has been evaluated.
                is_warm = iteration > self.ppo.critic.warmup_iterations
                if evaluates and is_warm and iteration % self.ppo.eval_every == 0 and not self.guard.stopped:
                    row |= self._evaluate(validation, iteration)
            self.history.append(row)
            self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, iteration)
            names = {"score": "score/mean", "kl": "kl/sequence", "length": "response/length"}
            shown = {name: row[key] for name, key in names.items() if key in row}
            samples = self.ppo.rollout.num_prompts * self.ppo.rollout.samples_per_prompt
            self.progress.step(iteration, self.ppo.num_iterations, shown, unit="iteration", samples=samples)
            if self.checkpoints.should_save():
                self._save(iteration)
        self.outcome = self.keeper.load(len(self.history), self.guard)
        self.progress.log(self.outcome.sentence)
        return self.history

    def close(self) -> None:
        """End the rewards, the environment and the rollout engine; the trained weights stay."""
        self.learner.rewards.close()
        self.sampler.close()
        self.rollout.close()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The actor's weights, one at a time. Every rank iterates over all of them."""
        return self.context.export(self.learner.engines["actor"])

    def _iterate(self, iteration: int, prompts: Sequence[Prompt]) -> dict[str, float]:
        started = time.monotonic()
        batch = [p for p in self._prompts_of(iteration, prompts) for _ in range(self.ppo.rollout.samples_per_prompt)]
        rows = local_rows(len(batch), self.ppo.minibatch, self.group)
        self.group.watchdog(f"PPO iteration {iteration}, rollout")
        seeds = [derive_seed("rollout", self.config.seed, iteration, row) for row in rows]
        completions = self.sampler.generate([batch[row] for row in rows], self.ppo.rollout.sampling, seeds)
        if self.ppo.advantage == "remax":
            completions = self._with_baselines(completions)
        group_size = self.ppo.rollout.samples_per_prompt if self.ppo.advantage in GROUP_ESTIMATORS else 1
        completions = share_rollout(rows, completions, self.ppo.minibatch, self.group, group_size=group_size)
        generated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, scoring")
        row = {"iteration": float(iteration), "kl/coef": self.kl_coef}
        experience, seen = None, ""
        try:
            experience = make_experience(self.learner, completions, kl_coef=self.kl_coef, group_size=group_size)
            metrics = experience_metrics(self.learner, experience, completions)
            scored = time.monotonic()
            row |= {name: value for name, value in metrics.items() if math.isfinite(value)}
            seen = self.guard.look(iteration, metrics, kl_coef=self.kl_coef)
            if not seen:
                self.group.watchdog(f"PPO iteration {iteration}, update")
                row |= update(self.learner, experience, seed=self.config.seed, iteration=iteration)
        except NonFiniteError as error:
            seen = str(error)
            if not self.guard.can_turn_back():
                raise
        if seen:
            self.group.watchdog(f"PPO iteration {iteration}, return to the last good state")
            self.kl_coef = self.guard.turn_back(iteration, seen, completions, experience)
            self.keeper.evals_without_improvement = 0
            self.sync.send()
            return row | {"guard/collapsed": 1.0}
        updated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, weight sync")
        self.sync.send()
        self.reference.follow(iteration)
        if self.ppo.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                row[f"kl/{self.ppo.kl_target_per}"],
                target=self.ppo.kl_target,
                horizon=self.ppo.kl_horizon,
                num_samples=len(batch),
            )
        return row | {
            **({} if self.ppo.guard.action == "off" else {"guard/collapsed": 0.0}),
            "seconds/generate": generated - started,
            "seconds/score": scored - generated,
            "seconds/update": updated - scored,
            "seconds/sync": time.monotonic() - updated,
        }

    def _with_baselines(self, completions: Sequence[Completion]) -> list[Completion]:
        """The completions with the reward of the greedy response to each of their prompts (Li et al. 2023, ReMax)."""
        prompts = {tuple(completion.prompt_ids): completion.prompt for completion in completions}
        greedy = self.sampler.generate(
            list(prompts.values()), self.ppo.rollout.sampling, [0] * len(prompts), greedy=True
        )
        truncated = torch.tensor([completion.truncated for completion in greedy])
        scores, _ = score(self.learner, greedy)
        rewards, _ = response_rewards(scores.cpu(), truncated, self.ppo)
        baselines = dict(zip(prompts, zip(rewards.tolist(), greedy, strict=True), strict=True))
        found = [(c, *baselines[tuple(c.prompt_ids)]) for c in completions]
        # Without its baseline a response cannot be learned from either.
        return [replace(c, baseline=baseline, failure=c.failure or of.failure) for c, baseline, of in found]

    def _prompts_of(self, iteration: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of one iteration: consecutive slices of a stream of shuffled epochs."""
        size = self.ppo.rollout.num_prompts
        rows = stream_slice(len(prompts), (iteration - 1) * size, size, seed=self.config.seed)
        return [prompts[row] for row in rows]

    def _evaluate(self, validation: Sequence[Prompt], iteration: int) -> dict[str, float]:
        """Metrics of the current policy on the validation prompts, and the objective, by which the keeper compares it with others."""
        self.group.watchdog(f"PPO evaluation after iteration {iteration}")
        metrics, samples = validate(self.learner, self.sampler, validation, iteration=iteration)
        self.validation += samples
        self.tracker.log_table("validation_samples", response_rows(samples))
        kl = metrics["kl/sequence"]
        objective = objective_of(metrics["reward/mean"], kl, kl_coef=self.ppo.kl_coef)
        self.keeper.add(Evaluation(iteration=iteration, objective=objective, kl=kl))
        return {f"validation/{name}": value for name, value in metrics.items()} | {"validation/objective": objective}

    def _save(self, iteration: int) -> None:
        state: dict[str, Any] = {
            "kl_coef": self.kl_coef,
            "history": self.history,
            "validation": [asdict(sample) for sample in self.validation],
            "evaluations": self.keeper.state(),
            "guard": self.guard.state(),
        }
        self.tracker.flush()
        self.checkpoints.save(iteration, self.saved, state)

    def _restore(self) -> int:
        """Load the latest checkpoint, if there is one; return the last iteration that is done."""
        state = self.checkpoints.restore(self.saved)
        if state is None:
            return 0
        self.kl_coef, self.history = state["kl_coef"], state["history"]
        self.validation = TypeAdapter(list[ValidationSample]).validate_python(state["validation"])
        self.keeper.restore(state["evaluations"])
        self.guard.restore(state["guard"])
        self.sync.send()
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
