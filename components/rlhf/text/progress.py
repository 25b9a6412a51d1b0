"""One line now and then that says how far a stage is, what its metrics are, and how long it will take."""

import os
import sys
import time
from collections.abc import Mapping

from components.rlhf.text.errors import InputError

SECONDS = "RLHF_PROGRESS_SECONDS"


class Progress:
    """Prints to stderr at most every few seconds (RLHF_PROGRESS_SECONDS, 5), so that logs of a cluster stay readable."""

    def __init__(self, stage: str, *, every_seconds: float | None = None, silent: bool = False) -> None:
        self.stage = stage
        self.silent = silent  # another process of the stage speaks
        self.every_seconds = _seconds_between_lines() if every_seconds is None else every_seconds
        self._first: tuple[str, int, float] | None = (
            None  # unit, step and time of the first call of what is counted now
        )
        self._shown = float("-inf")

    def log(self, text: str) -> None:
        """A line of its own, always shown."""
        if not self.silent:
            print(f"[{self.stage}] {text}", file=sys.stderr, flush=True)

    def step(self, step: int, total: int, metrics: Mapping[str, float], unit: str = "step") -> None:
        """step of total steps is done (from 1)."""
        now = time.monotonic()
        if self._first is None or self._first[0] != unit:
            self._first = (unit, step, now)
        if now - self._shown < self.every_seconds and step < total:
            return
        self._shown = now
        _, first_step, first_time = self._first
        values = [f"{name} {value:.4g}" for name, value in metrics.items()]
        if step > first_step:  # the first step also pays for loading, and after a resume it is not number 1
            values.append(f"{format_duration((now - first_time) / (step - first_step) * (total - step))} left")
        self.log("  ".join([f"{unit} {step}/{total}", *values]))


def _seconds_between_lines() -> float:
    text = os.environ.get(SECONDS, "5")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{SECONDS} is {text!r}; it takes a number of seconds, 0 for a line each step.") from None


def format_duration(seconds: float) -> str:
    """Minutes and seconds as 3:07, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
