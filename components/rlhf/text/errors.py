"""The exception whose message is written for the user."""

import math


class InputError(Exception):
    """An error that the user can fix; the message says what, where and what to do. Programs print it without a traceback and exit 1.

    The message may quote untrusted names and values: characters that break a line or control a terminal are escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def require_finite(value: float, *, name: str, step: int, batch: str, checkpoint: object) -> None:
    """Raise InputError if a loss, reward or gradient is nan or infinite. name and batch identify it in the message."""
    if not math.isfinite(value):
        saved = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
        raise InputError(
            f"{name} is {value} at step {step} ({batch}); {saved}. Lower the learning rate, or inspect these records."
        )
