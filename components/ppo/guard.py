"""The guard: what a rollout shows of a collapse of the policy, and what has been done about it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from components.ppo.experience import Experience
from components.rlhf.config.ppo import GuardConfig
from components.rlhf.data.records import Completion
from components.rlhf.engine.protocol import TrainEngine
from components.rlhf.runtime.training import TrainingContext
from components.rlhf.text.errors import InputError

GOOD = "good"  # name of the kept state
RATE_FACTOR = 0.5  # of the learning rates, at every rollback; Event says so too
ENDS = 0.1  # least share of the SFT model's responses that end, below which their share is no sign of health
MAX_SAMPLES = 256  # of one rollout: they are also part of every later checkpoint
SAMPLES_FILE = "guard.jsonl"  # of the artifact


@dataclass(frozen=True, kw_only=True)
class Event:
    """A rollout that was not trained on, and its consequence."""

    iteration: int
    seen: str  # what was wrong, as part of a sentence
    returned_to: int  # iteration after which the state had been kept
    stops: bool  # or training went on with lower learning rates

    def __str__(self) -> str:
        action = "training stopped" if self.stops else "training went on with half the learning rates"
        return f"iteration {self.iteration}: {self.seen}; back to the policy after iteration {self.returned_to}, and {action}"


@dataclass(frozen=True, kw_only=True)
class GuardSample:
    """One response of such a rollout; without score and KL where they were not finite."""

    iteration: int
    prompt_id: str
    prompt: str
    response: str
    truncated: bool
    score: float | None
    kl: float | None  # log-ratio to the reference in nats, summed over the response


@dataclass(kw_only=True)
class GuardState:
    """What the guard remembers; part of every checkpoint."""

    start: dict[str, float] = field(default_factory=dict)  # entropy and EOS rate of the first rollout, of the SFT model
    events: list[Event] = field(default_factory=list)
    samples: list[GuardSample] = field(default_factory=list)


class Guard:
    """Looks at every rollout before the update. Every rank calls each method, and all of them see and do the same."""

    def __init__(
        self,
        config: GuardConfig,
        context: TrainingContext,
        engines: Mapping[str, TrainEngine],
        *,
        max_kl: float | None,
    ) -> None:
        """max_kl is the limit of the KL where config has none of its own."""
        self.config, self.max_kl = config, max_kl
        self.checkpoints, self.group, self.progress = context.checkpoints, context.group, context.progress
        self.engines, self.peaks = engines, {name: engine.peak for name, engine in engines.items()}
        self.memory = GuardState()

    @property
    def is_on(self) -> bool:
        return self.config.action != "off"

    @property
    def events(self) -> list[Event]:
        return self.memory.events

    @property
    def stopped(self) -> bool:
        return any(event.stops for event in self.events)

    def look(self, iteration: int, metrics: Mapping[str, float], *, kl_coef: float) -> str:
        """What is wrong with the rollout of an iteration, as part of a sentence; empty if nothing is, and always if the guard is off.

        The state that sampled a good rollout is kept every keep_every iterations.
        """
        if not self.is_on:
            return ""
        if not self.memory.start:
            self.memory.start = {name: metrics[name] for name in ("entropy", "response/eos_rate")}
        seen = find_collapse(metrics, self.memory.start, self.config, self.max_kl)
        if not seen and (iteration - 1) % self.config.keep_every == 0:
            self.checkpoints.keep(GOOD, iteration - 1, self.engines, {"kl_coef": kl_coef})
        return seen

    def can_turn_back(self) -> bool:
        """Whether the guard is on, and there is a state to return to."""
        return self.is_on and self.checkpoints.kept(GOOD) is not None

    def turn_back(
        self, iteration: int, seen: str, completions: Sequence[Completion], experience: Experience | None
    ) -> float:
        """Return to the last good state, to go on from there with lower learning rates or to stop; returns its KL coefficient.

        experience is None if the completions could not be scored. The caller sends the weights to the rollout engine.
        """
        if not self.can_turn_back():
            raise InputError(
                f"iteration {iteration}: {seen}; no earlier state could be kept to which the guard can return."
            )
        state = self.checkpoints.load_kept(GOOD, self.engines)
        stops = self.config.action == "stop" or len(self.events) >= self.config.max_rollbacks
        event = Event(iteration=iteration, seen=seen, returned_to=int(state["step"]), stops=stops)
        samples = samples_of(iteration, completions, experience, limit=MAX_SAMPLES // self.group.world_size)
        self.memory.samples += self.group.gather(samples)
        self.memory.events.append(event)
        self._set_learning_rates()
        self.progress.log(f"guard, {event}; {SAMPLES_FILE} of the model will have the responses")
        return float(state["kl_coef"])

    def state(self) -> dict[str, Any]:
        return asdict(self.memory)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.memory = TypeAdapter(GuardState).validate_python(state)
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        factor = RATE_FACTOR ** sum(not event.stops for event in self.events)
        for name, engine in self.engines.items():
            engine.peak = self.peaks[name] * factor


def find_collapse(
    metrics: Mapping[str, float], start: Mapping[str, float], config: GuardConfig, max_kl: float | None
) -> str:
    """What is wrong with a rollout of these metrics, as part of a sentence; empty if nothing is.

    start has the metrics of the first rollout, and max_kl is the limit of the KL where the guard has none of its own.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    kl, entropy, eos_rate = metrics["kl/sequence"], metrics["entropy"], metrics["response/eos_rate"]
    limit, key = (max_kl, "gate.max_kl") if config.max_kl is None else (config.max_kl, "ppo.guard.max_kl")
    if limit is not None and kl > limit:
        return f"the KL to the SFT model is {kl:.2f} nats per response, above {limit:g} ({key})"
    if entropy < config.min_entropy * start["entropy"]:
        return (
            f"the entropy is {entropy:.3g} nats per token, below {config.min_entropy:.0%} of the {start['entropy']:.3g} at the start "
            "(ppo.guard.min_entropy)"
        )
    if start["response/eos_rate"] >= ENDS and eos_rate < config.min_eos_rate * start["response/eos_rate"]:
        return (
            f"{eos_rate:.1%} of the responses end, below {config.min_eos_rate:.0%} of the {start['response/eos_rate']:.1%} at the start "
            "(ppo.guard.min_eos_rate)"
        )
    return ""


def samples_of(
    iteration: int, completions: Sequence[Completion], experience: Experience | None, *, limit: int
) -> list[GuardSample]:
    """At most limit responses of a rollout, evenly spread over it. experience is None if they could not be scored."""
    rows = range(0, len(completions), max(-(-len(completions) // max(limit, 1)), 1))
    return [
        GuardSample(
            iteration=iteration,
            prompt_id=completions[row].prompt.id,
            prompt=completions[row].prompt.prompt,
            response=completions[row].response,
            truncated=completions[row].truncated,
            score=None if experience is None else _finite(experience.scores[row].item()),
            kl=None if experience is None else _finite(experience.kl[row].sum().item()),
        )
        for row in rows
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
