"""Which policy of a run is exported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from components.ppo.guard import Event, Guard
from components.ppo.validation import Evaluation
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.text.errors import InputError

BEST = "best"  # name of the kept state


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: which policy it exports and why, and what the curves show of it."""

    iteration: int = 0  # after which the policy was exported; 0: the SFT model
    reason: str = ""  # why it is this one, as part of a sentence
    kept: Evaluation | None = None  # that of the exported policy, if it was evaluated
    evaluations: Sequence[Evaluation] = field(default_factory=list)
    events: Sequence[Event] = field(default_factory=list)  # of the guard
    max_kl: float | None = None  # limit of the KL to the SFT model, in nats per response

    @property
    def sentence(self) -> str:
        source = f"policy after iteration {self.iteration}" if self.iteration else "SFT model (iteration 0)"
        return f"the exported policy is the {source}: {self.reason}"

    def numbers(self) -> dict[str, float]:
        """For metrics of the stage."""
        found = {"kept_iteration": float(self.iteration)}
        if self.kept:
            found |= {"kept_objective": self.kept.objective, "kept_kl": self.kept.kl}
        return found | ({"guard_events": float(len(self.events))} if self.events else {})

    def facts(self) -> dict[str, str]:
        """For the manifest, beside the numbers."""
        guard = "; ".join(f"guard, {event}" for event in self.events)
        return {"kept_reason": self.sentence} | ({"guard": guard} if guard else {})


class Keeper:
    """Compares the evaluations of a run, keeps the weights of the best policy, and notices when none improves. Every rank calls it."""

    def __init__(self, config: PpoStageConfig, context: TrainingContext, actor: TrainEngine) -> None:
        self.ppo, self.max_kl, self.actor = config.ppo, config.max_kl, actor
        self.checkpoints, self.progress = context.checkpoints, context.progress
        self.evaluations: list[Evaluation] = []
        self.evals_without_improvement = 0
        self.keeps_best = False

    def start(self, validation: Sequence[object]) -> None:
        """Raises InputError if the settings ask for the best policy, but no evaluation can find it."""
        problem = "" if validation else "there are no validation prompts (data.num_validation_prompts)"
        if not problem and not self.checkpoints.can_keep:
            problem = "with several nodes the best policy is kept in storage.checkpoint_uri, which is not set"
        if problem and self.ppo.keep == "best":
            raise InputError(f"ppo.keep is best, but {problem}; correct it, or set ppo.keep to last.")
        if problem and self.ppo.eval_every:
            self.progress.log(f"the last policy will be exported: {problem}")
        self.keeps_best = self.ppo.keeps_best and not problem

    def add(self, new: Evaluation) -> None:
        """Note an evaluation of the current policy, and keep its weights if it is the best one so far."""
        best = max((evaluation.objective for evaluation in self.evaluations), default=-math.inf)
        self.evals_without_improvement = 0 if new.objective > best else self.evals_without_improvement + 1
        if self.keeps_best and is_better(new, self.kept(), self.max_kl):
            facts = {"objective": new.objective, "kl": new.kl}
            self.checkpoints.keep(BEST, new.iteration, {"actor": self.actor}, facts, moments=False)
        self.evaluations.append(new)

    @property
    def has_converged(self) -> bool:
        return 0 < self.ppo.patience <= self.evals_without_improvement

    def kept(self) -> Evaluation | None:
        """The evaluation of the policy that is kept; None if there is none."""
        return self._of(self.checkpoints.kept(BEST))

    def load(self, num_iterations: int, guard: Guard) -> Outcome:
        """Load the policy to be exported into the actor, unless it is there, after this number of iterations."""
        iteration, reason = num_iterations, "the last one"
        if guard.stopped:
            iteration, reason = guard.events[-1].returned_to, "the last one that the guard found good"
        kept = self.kept() if self.keeps_best else None
        if kept:
            iteration, reason = kept.iteration, why_best(kept, self.evaluations, self.max_kl)
            if iteration != num_iterations:
                self.checkpoints.load_kept(BEST, {"actor": self.actor})
        if guard.stopped:
            reason += f"; the guard stopped the run in iteration {num_iterations}"
        return Outcome(
            iteration=iteration,
            reason=reason,
            kept=kept or self._of(iteration),
            evaluations=self.evaluations,
            events=guard.events,
            max_kl=self.max_kl,
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "all": [asdict(each) for each in self.evaluations],
            "without_improvement": self.evals_without_improvement,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.evaluations = TypeAdapter(list[Evaluation]).validate_python(state["all"])
        self.evals_without_improvement = int(state["without_improvement"])

    def _of(self, iteration: int | None) -> Evaluation | None:
        return next((evaluation for evaluation in self.evaluations if evaluation.iteration == iteration), None)


def is_better(new: Evaluation, kept: Evaluation | None, max_kl: float | None) -> bool:
    """Whether a new policy takes the place of the kept one: the higher objective within max_kl; if neither is, the smaller KL.

    The score of the rollouts never counts: it selects the policy that exploits the reward most.
    """
    if not math.isfinite(new.objective) or kept is None:
        return kept is None
    new_fits, kept_fits = (max_kl is None or evaluation.kl <= max_kl for evaluation in (new, kept))
    if new_fits and kept_fits:
        return new.objective > kept.objective
    return new_fits or (not kept_fits and new.kl < kept.kl)


def why_best(kept: Evaluation, evaluations: Sequence[Evaluation], max_kl: float | None) -> str:
    """Why a kept policy was chosen, as part of a sentence."""
    numbers = f"objective {kept.objective:.4g}, KL {kept.kl:.3g} nats per response"
    if max_kl is None:
        return f"the best validation objective of {len(evaluations)} evaluations ({numbers})"
    within = sum(evaluation.kl <= max_kl for evaluation in evaluations)
    if kept.kl > max_kl:
        return f"none of {len(evaluations)} evaluations has a KL of at most {max_kl:g}, and this one has the smallest ({numbers})"
    return f"the best validation objective of the {within} of {len(evaluations)} evaluations with a KL of at most {max_kl:g} ({numbers})"
