"""The process of a judge's Python function: python -m components.rlhf.rewards.function_process FOLDER

It reads FOLDER/call.json, calls the function, and writes FOLDER/result.json: {"scores": [...]} or {"error": "..."}. Modules are found
in FOLDER, in the working directory, and among the installed packages.
"""

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path


def main(folder: Path) -> None:
    call = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    sys.path[:0] = [str(folder)]
    result: dict[str, object]
    try:
        function = getattr(importlib.import_module(call["module"]), call["function"])
        result = {"scores": [float(score) for score in function(call["prompts"], call["responses"])]}
    except BaseException as error:  # also SystemExit
        traceback.print_exc()
        result = {"error": f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    (folder / "writing.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / "writing.json").replace(folder / "result.json")


def end_with_parent() -> None:
    """End when the other end of standard input is closed."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))
