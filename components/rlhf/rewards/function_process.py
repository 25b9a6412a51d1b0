"""The process of a user's Python function (function.py). It imports the module at the first call and keeps it.

A call names the module and the function, the file with the source or the folder with the code if there is one, and has the lists.
"""

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from components.rlhf.subprocesses.serving import serve
from components.rlhf.subprocesses.user_code import find_module


def call(request: dict[str, Any]) -> dict[str, Any]:
    """{"scores": [...]}, or {"error": "..."} with the rest of a sentence."""
    try:
        function = getattr(find_module(request), request["function"])
        arguments = [request["prompts"], request["responses"]]
        scores = function(*arguments, request["columns"]) if takes_columns(function) else function(*arguments)
        if isinstance(scores, str | bytes | dict):
            raise TypeError(f"it returned a {type(scores).__name__}, not a list of numbers")
        return {"scores": [float(score) for score in scores]}
    except BaseException as error:  # also SystemExit
        traceback.print_exc()
        return {"error": f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def takes_columns(function: Callable[..., Any]) -> bool:
    """Whether a function has a third parameter for the columns: one that is named so, or that must be given."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtin functions tell nothing
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 2 and (positional[2].name == "columns" or positional[2].default is inspect.Parameter.empty)


if __name__ == "__main__":
    serve(call)
