"""The PPO loop: sample, score, update, until the iterations are over or the validation score has converged."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from components.ppo.experience import Experience, Models, make_experience
from components.ppo.update import update
from components.rlhf.checkpoints.manager import CheckpointManager
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.data.batching import collate, epoch_order
from components.rlhf.data.records import Prompt, ValidationSample
from components.rlhf.engine.factory import create_engine
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.maths.kl import adapt_kl_coef
from components.rlhf.maths.masked import masked_moments
from components.rlhf.models.actor import SamplingDistribution
from components.rlhf.models.loading import collect_weights
from components.rlhf.rollout.probe import check_sync, probe_ids
from components.rlhf.rollout.protocol import RolloutEngine
from components.rlhf.runtime.memory import release_freed_memory
from components.rlhf.text.progress import Progress
from components.rlhf.tracking.mlflow import Tracker

History = list[dict[str, float]]
# Nats at any token of the probe. In bf16 engines round logits of 20 to the nearest 0.1 or so, each in its own way.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.75}
VALIDATION_SEED = 7_919  # validation draws the same uniforms at every look, so that looks differ by the policy alone


class PpoTrainer:
    """One run of PPO. Everything random follows from the seed and the iteration, so a resumed run goes the same way."""

    def __init__(
        self,
        config: PpoStageConfig,
        models: Models,
        rollout: RolloutEngine,
        *,
        stop_ids: tuple[int, ...],
        checkpoints: CheckpointManager,
        progress: Progress,
        tracker: Tracker,
        group: Group = SINGLE_PROCESS,
    ) -> None:
        self.config, self.ppo, self.group = config, config.ppo, group
        self.models, self.rollout = models, rollout
        self.checkpoints, self.progress, self.tracker = checkpoints, progress, tracker
        sampling = self.ppo.rollout.sampling
        self.distribution = SamplingDistribution(
            temperature=sampling.temperature, min_new_tokens=sampling.min_new_tokens, stop_ids=stop_ids
        )
        batch = self.ppo.rollout.num_prompts * self.ppo.rollout.samples_per_prompt
        steps = self.ppo.num_iterations * self.ppo.num_epochs * batch // self.ppo.minibatch
        rates = {"actor": self.ppo.training.learning_rate, "critic": self.ppo.critic.learning_rate}
        modules = {"actor": models.actor, "critic": models.critic}
        self.engines = {
            name: create_engine(
                module,
                self.ppo.training,
                num_steps=steps,
                group=group,
                dtype=module.dtype,
                learning_rate=rates[name],
            )
            for name, module in modules.items()
        }
        self.lengths_differ = sampling.min_new_tokens < sampling.max_new_tokens  # of responses, from rollout to rollout
        self.device = next(models.actor.parameters()).device
        self.kl_coef = self.ppo.kl_coef
        self.history: History = []
        self.validation: list[ValidationSample] = []
        self.evals_without_improvement = 0
        self.best_objective = float("-inf")

    def train(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> History:
        """Run every iteration that no checkpoint has; return one row of numbers per iteration."""
        first = self._restore() + 1
        self._check_sync()
        if first == 1 and self.ppo.eval_every and validation:
            self.tracker.log(self._validate(validation, 0), 0)  # what training starts from
        for iteration in range(first, self.ppo.num_iterations + 1):
            # Asked before the iteration, not after it: a run that was saved as it converged and then died stays converged.
            if self.ppo.patience and self.evals_without_improvement >= self.ppo.patience:
                self.progress.log(f"converged: no gain in {self.ppo.patience} looks at the validation prompts")
                break
            row = self._iterate(iteration, prompts)
            if self.lengths_differ:
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

    def weights(self) -> dict[str, Tensor]:
        """The actor's weights in main memory of the first process; every process calls it."""
        return collect_weights(self.engines["actor"].full_weights(), keep=self.group.rank == 0)

    def _iterate(self, iteration: int, prompts: Sequence[Prompt]) -> dict[str, float]:
        started = time.monotonic()
        asked = [p for p in self._prompts_of(iteration, prompts) for _ in range(self.ppo.rollout.samples_per_prompt)]
        # A generator takes 64 bits, which the product of a large seed exceeds.
        start = (self.config.seed * 1_000_003 + iteration) * 1_000_003 % 2**63
        own = local_rows(len(asked), self.ppo.minibatch, self.group)
        self.group.watchdog(f"PPO iteration {iteration}, rollout")
        completions = self.rollout.generate(
            [asked[row] for row in own], self.ppo.rollout.sampling, [start + row for row in own]
        )
        generated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, scoring")
        experience = make_experience(
            self.models, completions, self.ppo, self.distribution, kl_coef=self.kl_coef, group=self.group
        )
        scored = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, update")
        losses = update(
            experience,
            self.models,
            self.engines,
            self.ppo,
            self.distribution,
            seed=self.config.seed,
            iteration=iteration,
            group=self.group,
            checkpoint=self.checkpoints.latest,
        )
        updated = time.monotonic()
        self.group.watchdog(f"PPO iteration {iteration}, weight sync")
        self._sync()
        row = {
            "iteration": float(iteration),
            **rollout_metrics(experience, self.group),
            **losses,
            "kl/coef": self.kl_coef,
        }
        if self.ppo.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                row["kl/sequence"],
                target=self.ppo.kl_target,
                horizon=self.ppo.kl_horizon,
                num_samples=len(asked),
            )
        return row | {
            "seconds/generate": generated - started,
            "seconds/score": scored - generated,
            "seconds/update": updated - scored,
            "seconds/sync": time.monotonic() - updated,
        }

    def _prompts_of(self, iteration: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of one iteration: the stream of shuffled epochs, cut into equal pieces."""
        size = self.ppo.rollout.num_prompts
        start = (iteration - 1) * size
        return [
            prompts[
                epoch_order(len(prompts), seed=self.config.seed, epoch=position // len(prompts))[
                    position % len(prompts)
                ]
            ]
            for position in range(start, start + size)
        ]

    def _validate(self, validation: Sequence[Prompt], iteration: int) -> dict[str, float]:
        """Sample the validation prompts as they are; the objective is the mean score less its KL cost."""
        self.group.watchdog(f"PPO look at the validation prompts after iteration {iteration}")
        equal = len(validation) - len(validation) % self.group.world_size  # all processes run as many passes
        own = range(equal)[self.group.rank :: self.group.world_size]
        completions = self.rollout.generate(
            [validation[row] for row in own], self.ppo.rollout.sampling, [VALIDATION_SEED + row for row in own]
        )
        experience = make_experience(
            self.models, completions, self.ppo, self.distribution, kl_coef=0.0, group=self.group
        )
        found = rollout_metrics(experience, self.group)
        samples = [
            ValidationSample(
                iteration=iteration,
                num_rollouts=iteration * self.ppo.rollout.num_prompts * self.ppo.rollout.samples_per_prompt,
                prompt=completion.prompt.prompt,
                response=completion.response,
                num_tokens=len(completion.response_ids),
                truncated=completion.truncated,
                score=score,
                kl=kl,
            )
            for completion, score, kl in zip(
                completions, experience.scores.tolist(), experience.kl.sum(dim=1).tolist(), strict=True
            )
        ]
        self.validation += self.group.gather(samples)
        objective = found["score/mean"] - self.kl_coef * found["kl/sequence"]
        self.evals_without_improvement = 0 if objective > self.best_objective else self.evals_without_improvement + 1
        self.best_objective = max(objective, self.best_objective)
        return {f"validation/{name}": value for name, value in found.items()} | {"validation/objective": objective}

    def _sync(self) -> None:
        self.rollout.sync(self.models.actor.export_weights(self.engines["actor"].full_weights()))
        self._check_sync()

    @torch.no_grad()
    def _check_sync(self) -> None:
        """Let trainer and rollout engine score the same fixed text; they may differ by rounding."""
        ids = probe_ids(self.rollout.tokenizer)
        ours, _ = self.models.actor(collate([ids[:1]], [ids[1:]]).to(self.device), SamplingDistribution())
        theirs = self.rollout.prompt_logprobs(ids)
        check_sync(theirs, ours[0], tolerance=PROBE_TOLERANCE[self.models.actor.dtype], version=self.rollout.version)

    def _save(self, iteration: int) -> None:
        state: dict[str, Any] = {
            "kl_coef": self.kl_coef,
            "history": self.history,
            "validation": [asdict(sample) for sample in self.validation],
            "evals_without_improvement": self.evals_without_improvement,
            "best_objective": self.best_objective if self.history and self.best_objective > float("-inf") else None,
        }
        self.tracker.flush()
        self.checkpoints.save(iteration, self.engines, state)

    def _restore(self) -> int:
        """Load the newest checkpoint, if any; return the last iteration that is done."""
        state = self.checkpoints.restore(self.engines)
        if state is None:
            return 0
        self.kl_coef, self.history = state["kl_coef"], state["history"]
        self.validation = [ValidationSample(**sample) for sample in state["validation"]]
        self.evals_without_improvement = state["evals_without_improvement"]
        self.best_objective = float("-inf") if state["best_objective"] is None else state["best_objective"]
        self._sync()
        self.progress.log(f"resuming after iteration {state['step']} from {self.checkpoints.latest}")
        return int(state["step"])


def local_rows(total: int, minibatch: int, group: Group) -> list[int]:
    """Rows of a rollout that this process samples and trains on: its equal share of every minibatch."""
    share = minibatch // group.world_size
    return [row for row in range(total) if row % minibatch // share == group.rank]


def rollout_metrics(e: Experience, group: Group = SINGLE_PROCESS) -> dict[str, float]:
    """What one rollout looks like over all processes. Each name is translate_api_errors in components/ppo/README.md."""
    mask, rows = e.batch.response_mask, torch.ones_like(e.truncated)
    ended = ~e.truncated
    gap = torch.where(mask, (e.old_logprobs - e.engine_logprobs).abs(), 0)

    def moments(x: Tensor, where: Tensor) -> tuple[float, float]:
        mean, variance = masked_moments(x, where, group.sum)
        return mean.item(), variance.item()

    def mean(x: Tensor, where: Tensor) -> float:
        return moments(x, where)[0]

    score_mean, score_variance = moments(e.scores, rows)
    returns_variance, rest_variance = moments(e.returns, mask)[1], moments(e.returns - e.old_values, mask)[1]
    return {
        "score/mean": score_mean,
        "score/std": score_variance**0.5,
        "score/mean_ended": mean(e.scores, ended),
        "kl/sequence": mean(e.kl.sum(dim=1), rows),
        "kl/token": mean(e.kl, mask),
        "entropy": mean(e.entropy, mask),
        "response/length": mean(e.batch.response_lengths.float(), rows),
        "response/eos_rate": mean(ended.float(), rows),
        "value/mean": mean(e.old_values, mask),
        # 1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant.
        "value/explained_variance": 1 - rest_variance / returns_variance if returns_variance > 1e-8 else 0.0,
        "engine_gap/mean": mean(gap, mask),
        "engine_gap/max": group.max(gap.max()).item(),
    }


def final_metrics(history: History) -> Mapping[str, float]:
    """The last row under flat names, for KFP and the manifest."""
    last = {name.replace("/", "_"): value for name, value in history[-1].items()}
    return {"num_iterations": float(len(history)), "score_first": history[0]["score/mean"], **last}
