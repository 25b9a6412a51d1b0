"""Checks of hostile input: it is accepted, or refused with a readable error message."""

from collections.abc import Callable
from typing import Any

from components.rlhf.text.errors import InputError


def result_or_refusal(call: Callable[[], Any], error: type[Exception] = InputError) -> Any:
    """The result of call, or None if it raises this error with a one-line message of readable length."""
    try:
        return call()
    except error as refusal:
        message = str(refusal)
    assert message.strip() and message.isprintable(), repr(message)
    assert len(message) < 2000 and "Traceback" not in message, message
    return None
