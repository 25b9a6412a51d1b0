"""The process of a user's Python function (function.py). It imports the module at the first call and keeps it.

A call names the module and the function, the file with the source or the folder with the code if there is one, and has the lists.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from components.rlhf.rewards.serving import serve


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


def find_module(request: dict[str, Any]) -> ModuleType:
    """The module of the request, imported at the first call."""
    name = request["module"]
    if request["source"] and getattr(sys.modules.get(name), "__file__", None) != request["source"]:
        return load_source(name, Path(request["source"]))
    if request["code"] and request["code"] not in sys.path:
        sys.path.insert(0, request["code"])
    return importlib.import_module(name)


def load_source(name: str, path: Path) -> ModuleType:
    """The module of a source file under this name, whatever else has the name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


if __name__ == "__main__":
    serve(call)
