"""Progress lines of a stage: step, metrics and estimated time left."""

import os
import sys
import time
from collections.abc import Mapping

from components.rlhf.text.errors import InputError

INTERVAL_VARIABLE = "RLHF_PROGRESS_SECONDS"


class Progress:
    """Prints to stderr at most one step every RLHF_PROGRESS_SECONDS (default 5), so that cluster logs stay readable."""

    def __init__(self, stage: str, *, every_seconds: float | None = None, silent: bool = False) -> None:
        self.stage = stage
        self.silent = silent  # for every rank but 0
        self.every_seconds = _interval_seconds() if every_seconds is None else every_seconds
        self._first: tuple[str, int, float] | None = None  # unit, step and time of the first call with the current unit
        self._last_printed = float("-inf")

    def log(self, text: str) -> None:
        """Print a line, regardless of the interval."""
        if not self.silent:
            print(f"[{self.stage}] {text}", file=sys.stderr, flush=True)

    def step(self, step: int, total: int, metrics: Mapping[str, float], unit: str = "step") -> None:
        """Report that step (from 1) of total is done. A new unit starts a new estimate of the time left."""
        now = time.monotonic()
        if self._first is None or self._first[0] != unit:
            self._first = (unit, step, now)
        if now - self._last_printed < self.every_seconds and step < total:
            return
        self._last_printed = now
        _, first_step, first_time = self._first
        values = [f"{name} {value:.4g}" for name, value in metrics.items()]
        if step > first_step:  # excludes the first step, which includes loading, and the steps before a resume
            values.append(f"{format_duration((now - first_time) / (step - first_step) * (total - step))} left")
        self.log("  ".join([f"{unit} {step}/{total}", *values]))


def _interval_seconds() -> float:
    text = os.environ.get(INTERVAL_VARIABLE, "5")
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"{INTERVAL_VARIABLE} is {text!r}; set it to a number of seconds (0 prints every step)."
        ) from None


def format_duration(seconds: float) -> str:
    """Format seconds as M:SS, or H:MM:SS from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
