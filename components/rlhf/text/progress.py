"""Progress lines of a stage: step, metrics, rates and estimated time left."""

import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from components.rlhf.text.errors import InputError

INTERVAL_VARIABLE = "RLHF_PROGRESS_SECONDS"


class Progress:
    """Prints to stderr at most one step every RLHF_PROGRESS_SECONDS (default 5), so that cluster logs stay readable."""

    def __init__(self, stage: str, *, every_seconds: float | None = None, silent: bool = False) -> None:
        self.stage = stage
        self.silent = silent  # for every rank but 0
        self.every_seconds = _interval_seconds() if every_seconds is None else every_seconds
        self._first: tuple[str, int, float] | None = None  # unit, step and time of the first call with the current unit
        self._num_samples = 0  # since then
        self._last_printed = float("-inf")

    def log(self, text: str) -> None:
        """Print a line, regardless of the interval."""
        if not self.silent:
            print(f"[{self.stage}] {text}", file=sys.stderr, flush=True)

    def step(
        self, step: int, total: int, metrics: Mapping[str, float], unit: str = "step", *, samples: int = 0
    ) -> None:
        """Report that step (from 1) of total is done, with so many samples. A new unit starts new estimates of rates and time left."""
        now = time.monotonic()
        if self._first is None or self._first[0] != unit:
            self._first, self._num_samples = (unit, step, now), 0
        else:  # the first step includes loading
            self._num_samples += samples
        if now - self._last_printed < self.every_seconds and step < total:
            return
        self._last_printed = now
        _, first_step, first_time = self._first
        values = [f"{name} {value:.4g}" for name, value in metrics.items()]
        seconds = now - first_time
        if step > first_step and seconds > 0:  # excludes the first step, and the steps before a resume
            if self._num_samples:
                values.append(f"{self._num_samples / seconds:.3g} samples/s")
            values.append(format_rate((step - first_step) / seconds, unit))
            values.append(f"{format_duration(seconds / (step - first_step) * (total - step))} left")
        self.log("  ".join([f"{unit} {step}/{total}", *values]))


@dataclass(frozen=True)
class Step:
    """What a line of Progress.step says: done of total units, and metrics, rates and the time left in values."""

    unit: str
    done: int
    total: int
    values: tuple[str, ...]


def parse_step(line: str) -> Step | None:
    """The step in a line of progress, without the name of the stage; None for another line."""
    found = re.fullmatch(r"(\S.*?) (\d+)/([1-9]\d*)(?:  (.+))?", line)
    if not found:
        return None
    return Step(found[1], int(found[2]), int(found[3]), tuple(found[4].split("  ")) if found[4] else ())


def format_rate(per_second: float, unit: str) -> str:
    """3.1 steps/s, or 12 s/step for what is slower than one in a second. The last word of the unit is what is counted."""
    word = unit.split()[-1].rstrip("s")
    return f"{per_second:.3g} {word}s/s" if per_second >= 1 else f"{1 / per_second:.3g} s/{word}"


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
