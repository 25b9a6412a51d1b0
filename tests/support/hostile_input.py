"""Input that somebody made to break us: it works, or it ends in one sentence."""

from collections.abc import Callable
from typing import Any

from components.rlhf.text.errors import InputError


def one_sentence(call: Callable[[], Any], error: type[Exception] = InputError) -> Any:
    """What call returns, or None where it raises this error with one line of a readable length. Anything else is a failure."""
    try:
        return call()
    except error as refused:
        text = str(refused)
    assert text.strip() and text.isprintable(), repr(text)
    assert len(text) < 2000 and "Traceback" not in text, text
    return None
