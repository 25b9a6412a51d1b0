"""The one exception whose message is meant for the person who runs a stage."""

import math


class InputError(Exception):
    """What is wrong, where, and what to do, in one sentence. Programs print it without a traceback and exit 1.

    It may quote names and values from outside: whatever would break a line or steer a terminal is written as an escape.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class NonFiniteError(Exception):
    """A loss or a gradient is nan or infinite. A trainer turns it into an InputError that names the latest checkpoint."""


def require_finite(value: float, *, what: str, step: int, batch: str) -> None:
    """Raise NonFiniteError when a loss or a gradient is nan or infinite. batch names the records that it came from."""
    if not math.isfinite(value):
        raise NonFiniteError(f"{what} is {value} at step {step} ({batch})")
