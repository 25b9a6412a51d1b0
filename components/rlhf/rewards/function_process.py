"""The process of a judge's Python function: python -m components.rlhf.rewards.function_process FOLDER

It reads FOLDER/call.json, calls the function, and writes FOLDER/result.json: {"scores": [...]} or {"error": "..."}. The module is
FOLDER/source.py if that exists, else one of the working directory or an installed package.
"""

import importlib
import importlib.util
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType


def main(folder: Path) -> None:
    call = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    result: dict[str, object]
    try:
        module = load_source(call["module"], folder / "source.py") or importlib.import_module(call["module"])
        scores = getattr(module, call["function"])(call["prompts"], call["responses"])
        if isinstance(scores, str | bytes | dict):
            raise TypeError(f"it returned a {type(scores).__name__}, not a list of numbers")
        result = {"scores": [float(score) for score in scores]}
    except BaseException as error:  # also SystemExit
        traceback.print_exc()
        result = {"error": f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    (folder / "writing.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "writing.json").replace(folder / "result.json")


def load_source(name: str, path: Path) -> ModuleType | None:
    """The module of a source file under this name, whatever else has the name; None if there is no file."""
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def end_with_parent(descriptor: int) -> None:
    """End when the other end of the parent's pipe is closed."""
    while os.read(descriptor, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    # The function's own programs and input() must not wait for this pipe, which stays open.
    pipe = os.dup(0)
    os.set_inheritable(pipe, False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    threading.Thread(target=end_with_parent, args=(pipe,), daemon=True).start()
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the function do not hold up the result
