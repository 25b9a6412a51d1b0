"""The exception whose message is written for the user."""

import math


class InputError(Exception):
    """An error that the user can fix; the message says what, where and what to do. Programs print it without a traceback and exit 1.

    The message may quote untrusted names and values: characters that break a line or control a terminal are escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class NonFiniteError(Exception):
    """A loss, a gradient or a score is nan or infinite. A trainer turns it into an InputError that names the latest checkpoint."""


def require_finite(value: float, *, what: str, step: int, batch: str) -> None:
    """Raise NonFiniteError when a loss or a gradient is nan or infinite. batch names the records that it came from."""
    if not math.isfinite(value):
        raise NonFiniteError(f"{what} is {value} at step {step} ({batch})")


class RetryableError(InputError):
    """An InputError that another attempt some time later may not meet: an unreachable store, a checkpoint that is in use."""
