"""Which of two policies of a run the gate takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.rlhf.config.policy import TITLES, Method

PROMOTE = "promote"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the evaluation of one policy has found."""

    method: Method
    decision: str  # promote or reject
    win_rate: float | None  # over the SFT model; None if the judge cannot tell
    kl: float  # to the SFT model, in nats per response


def choose_better(outcomes: Sequence[Outcome]) -> Outcome:
    """The policy that goes to the gate.

    It is chosen among those that are promoted, or among all if none is: the one with the higher win rate, a missing one being the lowest;
    of equal ones the one with the lower KL; and of those PPO's.
    """
    promoted = [outcome for outcome in outcomes if outcome.decision == PROMOTE]

    def rank(outcome: Outcome) -> tuple[float, float, bool]:
        win_rate = -1.0 if outcome.win_rate is None else outcome.win_rate
        return -win_rate, outcome.kl, outcome.method != "ppo"

    return min(promoted or outcomes, key=rank)


def explain(better: Outcome, outcomes: Sequence[Outcome]) -> str:
    """Why the better policy goes to the gate, as a sentence."""
    (other,) = (outcome for outcome in outcomes if outcome.method != better.method)
    title, other_title = TITLES[better.method], TITLES[other.method]
    head = f"{title}'s policy goes to the gate"
    if better.decision != other.decision:
        return f"{head}, because {other_title}'s is rejected."
    among = "both are promoted" if better.decision == PROMOTE else "both are rejected"
    if better.win_rate != other.win_rate:
        lower = "none" if other.win_rate is None else f"{other.win_rate:.3f}"
        return f"{head}: {among}, and its win rate is higher ({better.win_rate:.3f} against {lower})."
    if better.kl != other.kl:
        return (
            f"{head}: {among} with equal win rates, and its KL is lower ({better.kl:.2f} against {other.kl:.2f} nats)."
        )
    return f"{head}: {among}, with equal win rate and KL."
