"""The PPO loop: sample, score and update, until the iterations are over, the validation objective has converged, or the guard stops."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from components.ppo.experience import Learner, Models, make_experience
from components.ppo.guard import Guard
from components.ppo.keep import Keeper, Outcome
from components.ppo.metrics import History, rollout_metrics
from components.ppo.sync import WeightSync
from components.ppo.update import update
from components.ppo.validation import Evaluation, objective_of, validate
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.batching import epoch_order
from components.rlhf.data.microbatches import deal_rows
from components.rlhf.data.records import Completion, Prompt, ValidationSample
from components.rlhf.engine.factory import create_engine
from components.rlhf.engine.protocol import Group
from components.rlhf.maths.kl import adapt_kl_coef
from components.rlhf.maths.seeds import derive_seed
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.rollout.protocol import RolloutEngine
from components.rlhf.runtime.memory import release_freed_memory
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.text.errors import NonFiniteError


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
        num_steps = self.ppo.num_iterations * self.ppo.num_epochs * self.rollout_batch // self.ppo.minibatch
        self.learner = Learner(
            models=models,
            config=self.ppo,
            distribution=SamplingDistribution(
                temperature=sampling.temperature, min_new_tokens=sampling.min_new_tokens, stop_ids=rollout.stop_ids
            ),
            group=self.group,
            engines={
                name: create_engine(
                    module,
                    self.ppo.training,
                    num_steps=num_steps,
                    group=self.group,
                    dtype=module.dtype,
                    learning_rate=learning_rate,
                )
                for name, module, learning_rate in (
                    ("actor", models.actor, self.ppo.training.learning_rate),
                    ("critic", models.critic, self.ppo.critic.learning_rate),
                )
            },
        )
        self.varying_lengths = sampling.min_new_tokens < sampling.max_new_tokens
        self.sync = WeightSync(config, models.actor, self.learner.engines["actor"], rollout)
        self.kl_coef = self.ppo.kl_coef
        self.history: History = []
        self.validation: list[ValidationSample] = []
        self.guard = Guard(self.ppo.guard, context, self.learner.engines, max_kl=config.max_kl)
        self.keeper = Keeper(config, context, self.learner.engines["actor"])
        self.outcome = Outcome()

    def train(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> History:
        """Run every iteration that no checkpoint has, and load the policy to be exported; return one row of metrics per iteration."""
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
                if evaluates and iteration % self.ppo.eval_every == 0 and not self.guard.stopped:
                    row |= self._evaluate(validation, iteration)
            self.history.append(row)
            self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, iteration)
            names = {"score": "score/mean", "kl": "kl/sequence", "length": "response/length"}
            shown = {name: row[key] for name, key in names.items() if key in row}
            self.progress.step(iteration, self.ppo.num_iterations, shown, unit="iteration")
            if self.checkpoints.should_save():
                self._save(iteration)
        self.outcome = self.keeper.load(len(self.history), self.guard)
        self.progress.log(self.outcome.sentence)
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
        completions = share_rollout(rows, completions, self.ppo.minibatch, self.group)
        generated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, scoring")
        row = {"iteration": float(iteration), "kl/coef": self.kl_coef}
        experience, seen = None, ""
        try:
            experience = make_experience(self.learner, completions, kl_coef=self.kl_coef)
            metrics = rollout_metrics(experience, self.group)
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

    def _prompts_of(self, iteration: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of one iteration: consecutive slices of a stream of shuffled epochs."""
        size, count = self.ppo.rollout.num_prompts, len(prompts)
        positions = range((iteration - 1) * size, iteration * size)
        epochs = range(positions[0] // count, positions[-1] // count + 1)
        orders = {epoch: epoch_order(count, seed=self.config.seed, epoch=epoch) for epoch in epochs}
        return [prompts[orders[position // count][position % count]] for position in positions]

    def _evaluate(self, validation: Sequence[Prompt], iteration: int) -> dict[str, float]:
        """Metrics of the current policy on the validation prompts, and the objective, by which the keeper compares it with others."""
        self.group.watchdog(f"PPO evaluation after iteration {iteration}")
        metrics, samples = validate(self.learner, self.rollout, validation, iteration=iteration)
        self.validation += samples
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
        self.checkpoints.save(iteration, self.learner.engines, state)

    def _restore(self) -> int:
        """Load the latest checkpoint, if there is one; return the last iteration that is done."""
        state = self.checkpoints.restore(self.learner.engines)
        if state is None:
            return 0
        self.kl_coef, self.history = state["kl_coef"], state["history"]
        self.validation = TypeAdapter(list[ValidationSample]).validate_python(state["validation"])
        self.keeper.restore(state["evaluations"])
        self.guard.restore(state["guard"])
        self.sync.send()
        self.progress.log(f"resuming after iteration {state['step']} from {self.checkpoints.latest}")
        return int(state["step"])


def local_rows(total: int, minibatch: int, group: Group) -> list[int]:
    """Rows of a rollout that this rank samples: its equal share of every minibatch."""
    share = minibatch // group.world_size
    return [row for row in range(total) if row % minibatch // share == group.rank]


def share_rollout(
    rows: Sequence[int], completions: Sequence[Completion], minibatch: int, group: Group
) -> list[Completion]:
    """The completions that this rank trains on: of every minibatch as many as each other rank, with nearly as many tokens.

    completions are those of the rows (of the whole rollout) that this rank has sampled. The result is in the order of the minibatches,
    and in each of them in the order of lengths.
    """
    rollout = [
        completion
        for _, completion in sorted(group.gather(list(zip(rows, completions, strict=True))), key=itemgetter(0))
    ]
    own = []
    for start in range(0, len(rollout), minibatch):
        part = rollout[start : start + minibatch]
        lengths = [len(completion.prompt_ids) + len(completion.response_ids) for completion in part]
        own += [part[index] for index in deal_rows(lengths, group.world_size)[group.rank]]
    return own
