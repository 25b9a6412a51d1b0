"""The process in which environments of the user live (user.py): one object of the class for each response, by number.

{"call": "reset", "response": ..., "prompt": ..., "columns": ..., and where the class is} -> {}
{"call": "step", "response": ..., "text": ...} -> {"observation": ..., "reward": ..., "done": ...}
{"call": "end", "numbers": [...]} -> {}

Instead there is {"failure": ...}, the rest of a sentence, of a call that raises or answers anything else, and {"late": true} of one that
takes longer than its seconds and can be interrupted.
"""

import math
import signal
import traceback
from typing import Any

from components.rlhf.subprocesses.serving import serve
from components.rlhf.subprocesses.user_code import find_module

_environments: dict[int, Any] = {}


class _LateError(BaseException):
    """No environment may catch it."""


def call(request: dict[str, Any]) -> dict[str, Any]:
    if request["call"] == "end":
        for number in request["numbers"]:
            _environments.pop(number, None)
        return {}
    try:
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            return _reset(request) if request["call"] == "reset" else _step(request)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _LateError:
        return {"late": True}
    except BaseException as error:  # also SystemExit
        traceback.print_exc()
        return {"failure": f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _reset(request: dict[str, Any]) -> dict[str, Any]:
    # The import has no time limit of its own but that of the parent: it happens once.
    signal.setitimer(signal.ITIMER_REAL, 0)
    made = getattr(find_module(request), request["function"])
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    environment = made()
    environment.reset(request["prompt"], request["columns"])
    _environments[request["response"]] = environment
    return {}


def _step(request: dict[str, Any]) -> dict[str, Any]:
    answer = _environments[request["response"]].step(request["text"])
    try:
        observation, reward, done = answer
        if not isinstance(observation, str):
            raise TypeError
        reward = float(reward)
    except (TypeError, ValueError):
        return {"failure": f"answered {answer!r:.200}, not (observation, reward, done) with a text and a number"}
    if not math.isfinite(reward):
        return {"failure": f"gave the reward {reward}"}
    # Half a surrogate pair has no UTF-8, and no token.
    return {"observation": observation.encode("utf-8", "replace").decode(), "reward": reward, "done": bool(done)}


def _interrupt(*_: object) -> None:
    raise _LateError


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _interrupt)
    serve(call)
