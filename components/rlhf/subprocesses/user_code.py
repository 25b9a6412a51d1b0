"""The modules of the user in a process of their own: from the source that the settings have, a folder of code, or an installed package."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


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
