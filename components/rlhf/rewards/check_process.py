"""The process that checks responses (checks.py): {"kind": ..., "seconds": ..., and what the check needs} -> {"value": ...}.

A check that takes too long is interrupted; one that cannot be interrupted ends with this process, which the caller replaces.
"""

import contextlib
import importlib
import logging
import resource
import signal
from collections.abc import Callable
from typing import Any

from components.rlhf.rewards.checks import BadAnswerError, matches, same_value, satisfies
from components.rlhf.subprocesses.serving import serve

CHECKS: dict[str, Callable[..., bool]] = {"regex": matches, "numeric": same_value, "json_schema": satisfies}
LIBRARIES = {"numeric": ("math_verify",), "json_schema": ("jsonschema", "referencing")}
MAX_BYTES = 4 * 2**30  # of address space: numbers of a response may have any number of digits


class _LateError(BaseException):
    """No check may catch it."""


def check(request: dict[str, Any]) -> dict[str, Any]:
    """{"value": bool}; {} if the check is late or takes too much memory; {"error": "..."} if the data is wrong.

    {"kind": ..., "load": True} imports what the check needs.
    """
    if request.pop("load", False):
        for module in LIBRARIES.get(request["kind"], ()):
            importlib.import_module(module)
        return {"value": True}
    function, seconds = CHECKS[request.pop("kind")], request.pop("seconds")
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return {"value": function(**request)}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except BadAnswerError as error:
        return {"error": str(error)}
    except (_LateError, MemoryError, RecursionError):
        return {}


def _interrupt(*_: object) -> None:
    raise _LateError


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _interrupt)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.ERROR)
    serve(check)
