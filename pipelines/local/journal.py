"""The finished stages of a run directory, which a resumed run does not run again.

Each finished stage has a JSON file with the digests of its command and of every file that it wrote. The command contains the
digests of the inputs (kfp passes their metadata), so a stage with different inputs has a different command and runs again. A file
NAME.begun has the digest of the command that started: if the run was killed after a stage had reported its outputs and before
they were recorded, they are recorded when the run resumes.
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
from components.rlhf.config.budget import without_budget
from components.rlhf.text.errors import InputError
from pipelines.local.runner import StageRecord, output_folder


class Journal:
    """The finished stages of a run, in folder/NAME.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_finished(self, name: str, command: list[str]) -> tuple[StageRecord | None, str]:
        """The record of a finished stage, or None and the reason why it must run again ("" if it never finished)."""
        path = self.folder / f"{name}.json"
        root = output_folder(command)
        if root is None:
            return None, ""
        if not path.is_file() and not self._recover_finished(name, command, root):
            return None, ""
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            record, files, digest = StageRecord(**entry["record"]), entry["files"], entry["command"]
        except (ValueError, TypeError, KeyError):
            return None, f"{path} cannot be read"
        if digest != command_digest(command):
            return None, "its settings, its inputs or the code changed"
        current_files = _file_digests(root)
        for file in sorted(files.keys() | current_files.keys()):
            if files.get(file) != current_files.get(file):
                return None, f"{root / file} was modified"
        record.reused = True
        return record, ""

    def record_finish(self, record: StageRecord, command: list[str]) -> None:
        """Record atomically that a stage has finished."""
        root = output_folder(command)
        if root is None:
            return
        content = {"command": command_digest(command), "record": asdict(record), "files": _file_digests(root)}
        write_json_atomic(self.folder / f"{record.name}.json", content)

    def record_start(self, name: str, command: list[str]) -> None:
        """Delete the outputs and records of earlier attempts of a stage, and record that it starts."""
        root = output_folder(command)
        if root is None:
            return
        for suffix in ("begun", "json"):
            (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        write_json_atomic(self.folder / f"{name}.begun", {"command": command_digest(command), "at": time.time()})

    def _recover_finished(self, name: str, command: list[str], root: Path) -> bool:
        """Record a stage that finished after the run had been killed, if its artifacts verify."""
        output = root / "executor_output.json"  # the last file that a stage writes, atomically
        try:
            start = json.loads((self.folder / f"{name}.begun").read_text(encoding="utf-8"))
            if start["command"] != command_digest(command):
                return False
            for artifact in json.loads(output.read_text(encoding="utf-8"))["artifacts"]:
                if (root / artifact).is_dir():
                    open_artifact(root / artifact, *KINDS)
                elif not (root / artifact).is_file():
                    return False
            seconds = max(0.0, output.stat().st_mtime - start["at"])
        except (OSError, ValueError, TypeError, KeyError, InputError):
            return False
        self.record_finish(StageRecord(name=name, status="succeeded", seconds=seconds), command)
        return True


def command_digest(command: list[str]) -> str:
    """SHA-256 of the command of a stage and of the code revision."""
    parts = [code_revision(), *(_canonical(argument) for argument in command)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _canonical(argument: str) -> str:
    """The argument without what changes no result: the budget, what was measured of an input, and the order of keys in executor input."""
    try:
        content = json.loads(without_budget(argument))
    except ValueError:
        return argument
    inputs = content.get("inputs") if isinstance(content, dict) else None
    if not isinstance(inputs, dict):
        return json.dumps(content, sort_keys=True)
    values = inputs.get("parameterValues")
    if isinstance(values, dict) and isinstance(values.get("settings"), str):
        values["settings"] = without_budget(values["settings"])
    for listed in inputs.get("artifacts", {}).values():
        for artifact in listed.get("artifacts", []):
            # The digest covers everything but measurements, such as the memory of the process that wrote the artifact.
            if "digest" in artifact.get("metadata", {}):
                artifact["metadata"] = {"digest": artifact["metadata"]["digest"]}
    return json.dumps(content, sort_keys=True)


def write_json_atomic(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old or the new content, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _file_digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file under root."""
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): sha256_of(path) for path in paths}
