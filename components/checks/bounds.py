"""Bounds on the policy's number, or on its difference from the SFT model's, and whether an interval keeps them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from components.rlhf.artifacts.check_rows import CheckRow
from components.rlhf.maths.intervals import Bootstrap, Floats, Interval, bootstrap_ratio, paired_rates, wilson_interval

# By the name of the setting: what it is about, and the end of the interval that must not be beyond it.
BOUNDS: dict[str, tuple[Literal["the policy", "the increase", "the decrease"], Literal["low", "high"]]] = {
    "min_rate": ("the policy", "low"),
    "max_rate": ("the policy", "high"),
    "max_increase": ("the increase", "high"),
    "max_decrease": ("the decrease", "high"),
    "max_drop": ("the decrease", "high"),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Numbers of both models on the same N items, such as texts; those of a pair are resampled together."""

    check: str
    item: str = ""
    unit: str
    sft: Floats  # [N], summed over what the item consists of
    policy: Floats  # [N]
    sizes: Floats | None = None  # [N] such as tokens; None: 1 each

    def row(self, bound: str, limit: float, bootstrap: Bootstrap) -> CheckRow:
        """The row of a bound. A rate has Wilson's interval, a difference of rates Agresti and Min's, others the bootstrap's."""
        about, end = BOUNDS[bound]
        sizes = np.ones(len(self.sft)) if self.sizes is None else self.sizes
        if about == "the policy":
            hits = float(self.policy.sum())
            low, high = wilson_interval(hits, len(self.policy), confidence=bootstrap.confidence)
            interval = Interval(value=hits / len(self.policy), low=low, high=high)
        else:
            difference = self.policy - self.sft if about == "the increase" else self.sft - self.policy
            if self.sizes is None and np.isin([self.sft, self.policy], (0.0, 1.0)).all():
                interval = paired_rates(difference, bootstrap.confidence)
            else:
                interval = bootstrap_ratio(difference, sizes, bootstrap)
        return CheckRow(
            check=self.check,
            item=self.item,
            unit=self.unit,
            num=len(self.sft),
            sft=float(self.sft.sum() / sizes.sum()),
            policy=float(self.policy.sum() / sizes.sum()),
            about=about,
            value=interval.value,
            low=interval.low,
            high=interval.high,
            bound=bound,
            limit=limit,
            passed=interval.low >= limit if end == "low" else interval.high <= limit,
        )


def unmeasured(check: str, bounds: dict[str, float], problem: str, *, unit: str = "") -> list[CheckRow]:
    """The rows of a check that could not be measured, which have not passed."""
    return [
        CheckRow(
            check=check, unit=unit, about=BOUNDS[bound][0], bound=bound, limit=limit, passed=False, problem=problem
        )
        for bound, limit in bounds.items()
    ]
