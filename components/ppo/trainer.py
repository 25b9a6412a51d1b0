"""The PPO loop: sample, score, update, until the iterations are over or the validation score has converged."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from components.ppo.experience import Experience, Models, make_experience
from components.ppo.update import update
from components.rlhf.checkpoints.folder import CheckpointFolder
from components.rlhf.config.ppo import PpoStage
from components.rlhf.data.batching import epoch_order
from components.rlhf.data.records import Prompt, ValidationSample
from components.rlhf.edges.process import give_back_memory
from components.rlhf.edges.progress import Progress
from components.rlhf.edges.tracking import Tracker
from components.rlhf.engine.plain import TorchEngine
from components.rlhf.maths.kl import adapt_kl_coef
from components.rlhf.maths.masked import masked_mean
from components.rlhf.models.actor import Distribution
from components.rlhf.rollout.protocol import RolloutEngine

History = list[dict[str, float]]
VALIDATION_SEED = 7_919  # validation draws the same uniforms at every look, so that looks differ by the policy alone


class PpoTrainer:
    """One run of PPO. Everything random follows from the seed and the iteration, so a resumed run goes the same way."""

    def __init__(
        self,
        stage: PpoStage,
        models: Models,
        rollout: RolloutEngine,
        *,
        stop_ids: tuple[int, ...],
        checkpoints: CheckpointFolder,
        progress: Progress,
        tracker: Tracker,
    ) -> None:
        self.stage, self.ppo = stage, stage.ppo
        self.models, self.rollout = models, rollout
        self.checkpoints, self.progress, self.tracker = checkpoints, progress, tracker
        sampling = self.ppo.rollout.sampling
        self.distribution = Distribution(
            temperature=sampling.temperature, min_new_tokens=sampling.min_new_tokens, stop_ids=stop_ids
        )
        batch = self.ppo.rollout.num_prompts * self.ppo.rollout.samples_per_prompt
        steps = self.ppo.num_iterations * self.ppo.num_epochs * batch // self.ppo.minibatch
        training, critic = self.ppo.training, self.ppo.critic
        self.engines = {
            "actor": TorchEngine(models.actor, training, num_steps=steps),
            "critic": TorchEngine(models.critic, training, num_steps=steps, learning_rate=critic.learning_rate),
        }
        self.lengths_differ = sampling.min_new_tokens < sampling.max_new_tokens  # of responses, from rollout to rollout
        self.kl_coef = self.ppo.kl_coef
        self.history: History = []
        self.validation: list[ValidationSample] = []
        self.looks_without_gain = 0
        self.best_objective = float("-inf")

    def train(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> History:
        """Run every iteration that no checkpoint has; return one row of numbers per iteration."""
        first = self._restore() + 1
        if first == 1 and self.ppo.eval_every and validation:
            self.tracker.log(self._look(validation, 0), 0)  # what training starts from
        for iteration in range(first, self.ppo.num_iterations + 1):
            # Asked before the iteration, not after it: a run that was saved as it converged and then died stays converged.
            if self.ppo.patience and self.looks_without_gain >= self.ppo.patience:
                self.progress.say(f"converged: no gain in {self.ppo.patience} looks at the validation prompts")
                break
            row = self._iterate(iteration, prompts)
            if self.lengths_differ:
                give_back_memory()
            if self.ppo.eval_every and iteration % self.ppo.eval_every == 0 and validation:
                row |= self._look(validation, iteration)
            self.history.append(row)
            self.tracker.log({name: value for name, value in row.items() if name != "iteration"}, iteration)
            shown = {"score": row["score/mean"], "kl": row["kl/sequence"], "length": row["response/length"]}
            self.progress.step(iteration, self.ppo.num_iterations, shown, unit="iteration")
            if self.checkpoints.due():
                self._save(iteration)
        return self.history

    def _iterate(self, iteration: int, prompts: Sequence[Prompt]) -> dict[str, float]:
        started = time.monotonic()
        asked = [p for p in self._prompts_of(iteration, prompts) for _ in range(self.ppo.rollout.samples_per_prompt)]
        # A generator takes 64 bits, which the product of a large seed exceeds.
        start = (self.stage.seed * 1_000_003 + iteration) * 1_000_003 % 2**63
        seeds = [start + number for number in range(len(asked))]
        completions = self.rollout.generate(asked, self.ppo.rollout.sampling, seeds)
        generated = time.monotonic()
        experience = make_experience(self.models, completions, self.ppo, self.distribution, kl_coef=self.kl_coef)
        scored = time.monotonic()
        losses = update(
            experience,
            self.models,
            self.engines,
            self.ppo,
            self.distribution,
            seed=self.stage.seed,
            iteration=iteration,
            checkpoint=self.checkpoints.newest,
        )
        updated = time.monotonic()
        self._sync()
        row = {"iteration": float(iteration), **describe(experience), **losses, "kl/coef": self.kl_coef}
        if self.ppo.kl_target is not None:
            self.kl_coef = adapt_kl_coef(
                self.kl_coef,
                row["kl/sequence"],
                target=self.ppo.kl_target,
                horizon=self.ppo.kl_horizon,
                num_samples=len(completions),
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
                epoch_order(len(prompts), seed=self.stage.seed, epoch=position // len(prompts))[position % len(prompts)]
            ]
            for position in range(start, start + size)
        ]

    def _look(self, validation: Sequence[Prompt], iteration: int) -> dict[str, float]:
        """Sample the validation prompts as they are; the objective is the mean score less its KL cost."""
        seeds = [VALIDATION_SEED + number for number in range(len(validation))]
        completions = self.rollout.generate(validation, self.ppo.rollout.sampling, seeds)
        experience = make_experience(self.models, completions, self.ppo, self.distribution, kl_coef=0.0)
        found = describe(experience)
        self.validation += [
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
        objective = found["score/mean"] - self.kl_coef * found["kl/sequence"]
        self.looks_without_gain = 0 if objective > self.best_objective else self.looks_without_gain + 1
        self.best_objective = max(objective, self.best_objective)
        return {f"validation/{name}": value for name, value in found.items()} | {"validation/objective": objective}

    def _sync(self) -> None:
        self.rollout.sync(self.models.actor.export_weights(self.engines["actor"].full_weights()))

    def _save(self, iteration: int) -> None:
        state: dict[str, Any] = {
            "kl_coef": self.kl_coef,
            "history": self.history,
            "validation": [asdict(sample) for sample in self.validation],
            "looks_without_gain": self.looks_without_gain,
            "best_objective": self.best_objective if self.history and self.best_objective > float("-inf") else None,
        }
        self.checkpoints.save(iteration, self.engines, state)

    def _restore(self) -> int:
        """Load the newest checkpoint, if any; return the last iteration that is done."""
        state = self.checkpoints.restore(self.engines)
        if state is None:
            return 0
        self.kl_coef, self.history = state["kl_coef"], state["history"]
        self.validation = [ValidationSample(**sample) for sample in state["validation"]]
        self.looks_without_gain = state["looks_without_gain"]
        self.best_objective = float("-inf") if state["best_objective"] is None else state["best_objective"]
        self._sync()
        self.progress.say(f"resuming after iteration {state['step']} from {self.checkpoints.newest}")
        return int(state["step"])


def describe(e: Experience) -> dict[str, float]:
    """What one rollout looks like. Each name is explained in components/ppo/README.md."""
    mask = e.batch.response_mask
    gap = torch.where(mask, (e.old_logprobs - e.engine_logprobs).abs(), 0)
    ended = ~e.truncated
    return {
        "score/mean": e.scores.mean().item(),
        "score/std": e.scores.std(unbiased=False).item(),
        "score/mean_ended": e.scores[ended].mean().item() if ended.any() else 0.0,
        "kl/sequence": e.kl.sum(dim=1).mean().item(),
        "kl/token": masked_mean(e.kl, mask).item(),
        "entropy": masked_mean(e.entropy, mask).item(),
        "response/length": e.batch.response_lengths.float().mean().item(),
        "response/eos_rate": ended.float().mean().item(),
        "value/mean": masked_mean(e.old_values, mask).item(),
        "value/explained_variance": explained_variance(e),
        "engine_gap/mean": masked_mean(gap, mask).item(),
        "engine_gap/max": gap.max().item(),
    }


def explained_variance(e: Experience) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 is a perfect critic, 0 no better than a constant."""
    mask = e.batch.response_mask
    returns, values = e.returns[mask], e.old_values[mask]
    variance = returns.var(unbiased=False)
    return float(1 - (returns - values).var(unbiased=False) / variance) if variance > 1e-8 else 0.0


def final_metrics(history: History) -> Mapping[str, float]:
    """The last row under flat names, for KFP and the manifest."""
    last = {name.replace("/", "_"): value for name, value in history[-1].items()}
    return {"num_iterations": float(len(history)), "score_first": history[0]["score/mean"], **last}
