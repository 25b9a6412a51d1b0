"""What has finished in a run directory, so that a run that died goes on after it instead of beginning again.

One small file a stage: the digest of the command that ran and of every file it left. A command names its inputs by digest (kfp
passes their metadata along), so a stage whose inputs came out otherwise has another command, and runs again. Another file says
which command began: what died after the stage had reported its outputs, and before they were noted, is noted then.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import KINDS, sha256_of
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.text.errors import InputError
from pipelines.local.runner import StageRecord


class Journal:
    """The stages that finished in a run, under folder/NAME.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self, name: str, command: list[str]) -> tuple[StageRecord | None, str]:
        """The record of a stage that need not run again, or why one that had finished must; (None, "") when it had not."""
        path = self.folder / f"{name}.json"
        root = output_folder(command)
        if root is None:
            return None, ""
        if not path.is_file() and not self._recover_finished(name, command, root):
            return None, ""
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            record, files, ran = StageRecord(**entry["record"]), entry["files"], entry["command"]
        except (ValueError, TypeError, KeyError):
            return None, f"{path} cannot be read"
        if ran != command_digest(command):
            return None, "its settings, its inputs or the code are others now"
        found = _files(root)
        for file in sorted(files.keys() | found.keys()):
            if files.get(file) != found.get(file):
                return None, f"{root / file} is not what it wrote"
        record.reused = True
        return record, ""

    def write(self, record: StageRecord, command: list[str]) -> None:
        """Note that a stage has finished; whole or not at all."""
        root = output_folder(command)
        if root is None:
            return
        content = {"command": command_digest(command), "record": asdict(record), "files": _files(root)}
        write_json_atomic(self.folder / f"{record.name}.json", content)

    def begin(self, name: str, command: list[str]) -> None:
        """Before a stage runs (again): nothing of an earlier attempt stays."""
        root = output_folder(command)
        if root is None:
            return
        for suffix in ("begun", "json"):
            (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        write_json_atomic(self.folder / f"{name}.begun", {"command": command_digest(command), "at": time.time()})

    def _recover_finished(self, name: str, command: list[str], root: Path) -> bool:
        """Note a stage that came to its end when nobody was left to note it. Its artifacts must verify by themselves."""
        output = root / "executor_output.json"  # the last that a stage writes, atomically
        try:
            begun = json.loads((self.folder / f"{name}.begun").read_text(encoding="utf-8"))
            if begun["command"] != command_digest(command):
                return False
            for artifact in json.loads(output.read_text(encoding="utf-8"))["artifacts"]:
                if (root / artifact).is_dir():
                    open_artifact(root / artifact, *KINDS)
                elif not (root / artifact).is_file():
                    return False
            seconds = max(0.0, output.stat().st_mtime - begun["at"])
        except (OSError, ValueError, TypeError, KeyError, InputError):
            return False
        self.write(StageRecord(name=name, status="succeeded", seconds=seconds), command)
        return True


def output_folder(command: list[str]) -> Path | None:
    """The folder of a task's outputs, where its executor input wants the executor output; None without one."""
    if "--executor-input" not in command:
        return None
    executor_input = json.loads(command[command.index("--executor-input") + 1])
    return Path(executor_input["outputs"]["outputFile"]).parent


def command_digest(command: list[str]) -> str:
    """Of everything a stage is told, and of the code that it is told to run."""
    words = [code_revision(), *(_canonical(word) for word in command)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _canonical(word: str) -> str:
    """JSON with its keys sorted: kfp writes the executor input in an order that differs from process to process."""
    try:
        return json.dumps(json.loads(word), sort_keys=True)
    except ValueError:
        return word


def write_json_atomic(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old content or the new, whatever dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.writing")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _files(root: Path) -> dict[str, str]:
    """sha256 of every file that a task left."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in paths}
