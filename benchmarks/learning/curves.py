"""Learning curves read at equal KL and at equal score. A curve is the list of rows of one system and seed, with the SFT model first."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Row = dict[str, Any]


def curve_of(rows: Sequence[Row], system: str, start: str) -> list[Row]:
    """The rows of a system by iteration, after that of the start; empty unless both are there."""
    first = [row for row in rows if row["system"] == start]
    own = sorted((row for row in rows if row["system"] == system), key=lambda row: int(row["iteration"]))
    return [first[0], *own] if first and own else []


def read_at(curve: Sequence[Row], along: str, level: float, name: str) -> float | None:
    """The value of a column where another one first reaches a level, interpolated between neighbors; None if it never does.

    Curves may fall again: what counts is the first time, as one would have seen it in training.
    """
    if curve[0][along] >= level:
        return float(curve[0][name])
    for before, after in pairwise(curve):
        if before[along] < level <= after[along]:
            share = (level - before[along]) / (after[along] - before[along])
            return float(before[name] + share * (after[name] - before[name]))
    return None


def common_kl(curves: Sequence[Sequence[Row]]) -> float:
    """The largest KL that all curves reach."""
    return min(max(float(row["kl"]) for row in curve) for curve in curves)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both systems on one seed. Scores are gains over the SFT model."""

    seed: int
    kl: float  # the largest that both reach
    judge: tuple[float, float]  # ours and the peer's at that KL
    reward: tuple[float, float]
    judge_half: tuple[float, float]  # at half of that KL
    peer_last: float  # the peer's judge score after its last rollout
    peer_rollouts: int
    rollouts: float | None  # that ours takes to reach it; None if it never does

    @property
    def gain(self) -> float:
        """How much higher our judge score is at equal KL."""
        return self.judge[0] - self.judge[1]

    @property
    def share(self) -> float:
        """Our rollouts over the peer's; infinite if ours never gets there."""
        return float("inf") if self.rollouts is None else self.rollouts / self.peer_rollouts


def compare(seed: int, ours: Sequence[Row], peer: Sequence[Row]) -> Pair:
    kl, sft = common_kl([ours, peer]), ours[0]

    def both(level: float, name: str) -> tuple[float, float]:
        found = [read_at(curve, "kl", level, name) for curve in (ours, peer)]
        first, second = (value - sft[name] for value in found if value is not None)
        return first, second

    return Pair(
        seed=seed,
        kl=kl,
        judge=both(kl, "judge"),
        reward=both(kl, "reward"),
        judge_half=both(kl / 2, "judge"),
        peer_last=peer[-1]["judge"] - sft["judge"],
        peer_rollouts=int(peer[-1]["num_rollouts"]),
        rollouts=read_at(ours, "judge", peer[-1]["judge"], "num_rollouts"),
    )


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """The mean, with the standard deviation over seeds if there are several."""
    middle = format(statistics.fmean(values), form)
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):{form.lstrip('+')}}"
