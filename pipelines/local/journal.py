"""The finished stages of a run directory, which a resumed run does not run again, and which later runs of a sweep share.

Each finished stage has a JSON file with the digests of its command and of every file that it wrote. The command contains the
digests of the inputs (kfp passes their metadata), so a stage with different inputs has a different command and runs again. A file
NAME.begun has the digest of the command that started: if the run was killed after a stage had reported its outputs and before
they were recorded, they are recorded when the run resumes.

The digest of a command does not depend on where the run directory is. A stage with the command of a finished stage of a donor run has
its outputs: they are linked into the run directory, and verified like those of its own. Nothing writes into a linked file: a stage
starts with an empty folder.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import KINDS, sha256_of
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.budget import without_budget
from components.rlhf.text.errors import InputError
from pipelines.local.location import moved, without_location
from pipelines.local.runner import StageRecord, output_folder

OUTPUT = "executor_output.json"  # the last file that a stage writes, atomically; it has the paths of the others
NOT_SHARED = ("register",)  # every run has its own version in the registry
CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class Journal:
    """The finished stages of the run in a directory, in finished/NAME.json; donors are directories of other runs."""

    def __init__(self, run: Path, donors: Sequence[Path] = ()) -> None:
        self.run, self.folder, self.donors = run, run / "finished", donors

    def find_finished(self, name: str, command: list[str]) -> tuple[StageRecord | None, str]:
        """The record of a finished stage, of this run or of a donor, or None and the reason why it must run again ("" if it never
        finished).
        """
        root, reason = output_folder(command), ""
        if root is None:
            return None, ""
        digest = command_digest(command, self.run)
        if (self.folder / f"{name}.json").is_file() or self._recover_finished(name, digest, root):
            record, reason = self._verify(name, digest, root)
            if record:
                return record, ""
        for donor in self.donors if not name.startswith(NOT_SHARED) else ():
            if self._link(name, digest, root, donor):
                record, _ = self._verify(name, digest, root)
                if record:
                    return record, ""
        return None, reason

    def _verify(self, name: str, digest: str, root: Path) -> tuple[StageRecord | None, str]:
        """The record of a stage that has finished with this command and whose outputs are unchanged, or the reason against it."""
        path = self.folder / f"{name}.json"
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            record, files, place = StageRecord(**entry["record"]), entry["files"], Path(entry["run"])
            has_same_command = entry["command"] == digest
        except (ValueError, TypeError, KeyError):
            return None, f"{path} cannot be read"
        if not has_same_command:
            return None, "its settings, its inputs or the code changed"
        if place != self.run and (root / OUTPUT).is_file():  # the run directory was moved
            _copy_output(root / OUTPUT, root / OUTPUT, place, self.run)
        current_files = _file_digests(root, self.run)
        for file in sorted(files.keys() | current_files.keys()):
            if files.get(file) != current_files.get(file):
                return None, f"{root / file} was modified"
        if place != self.run:
            write_json_atomic(path, {**entry, "run": str(self.run)})
        record.reused = True
        return record, ""

    def _link(self, name: str, digest: str, root: Path, donor: Path) -> bool:
        """Link the outputs of a stage of the donor into this run, if its command is the same; whether that was possible."""
        entry = _read_entry(donor / "finished" / f"{name}.json")
        if entry.get("command") != digest:
            return False
        source = donor / root.relative_to(self.run)
        self._begin(name, digest, root)
        try:
            for path in sorted(source.rglob("*")):
                if path.is_file() and path != source / OUTPUT:
                    _link_or_copy(path, root / path.relative_to(source))
            if (source / OUTPUT).is_file():
                _copy_output(source / OUTPUT, root / OUTPUT, Path(entry["run"]), self.run)
        except FileNotFoundError:  # the donor's stage is running again
            return False
        record = entry["record"] | {"shared_with": entry["record"].get("shared_with") or donor.name}
        write_json_atomic(self.folder / f"{name}.json", {**entry, "record": record, "run": str(self.run)})
        return True

    def record_finish(self, record: StageRecord, command: list[str]) -> None:
        """Record atomically that a stage has finished."""
        root = output_folder(command)
        if root is not None:
            self._record(record, command_digest(command, self.run), root)

    def _record(self, record: StageRecord, digest: str, root: Path) -> None:
        files = _file_digests(root, self.run)
        content = {"command": digest, "record": asdict(record), "files": files, "run": str(self.run)}
        write_json_atomic(self.folder / f"{record.name}.json", content)

    def record_start(self, name: str, command: list[str]) -> None:
        """Delete the outputs and records of earlier attempts of a stage, and record that it starts."""
        root = output_folder(command)
        if root is not None:
            self._begin(name, command_digest(command, self.run), root)

    def _begin(self, name: str, digest: str, root: Path) -> None:
        for suffix in ("begun", "json"):
            (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        write_json_atomic(self.folder / f"{name}.begun", {"command": digest, "at": time.time()})

    def _recover_finished(self, name: str, digest: str, root: Path) -> bool:
        """Record a stage that finished after the run had been killed, if its artifacts verify."""
        output = root / OUTPUT
        try:
            start = json.loads((self.folder / f"{name}.begun").read_text(encoding="utf-8"))
            if start["command"] != digest:
                return False
            for artifact in json.loads(output.read_text(encoding="utf-8"))["artifacts"]:
                if (root / artifact).is_dir():
                    open_artifact(root / artifact, *KINDS)
                elif not (root / artifact).is_file():
                    return False
            seconds = max(0.0, output.stat().st_mtime - start["at"])
        except (OSError, ValueError, TypeError, KeyError, InputError):
            return False
        self._record(StageRecord(name=name, status="succeeded", seconds=seconds), digest, root)
        return True


def command_digest(command: list[str], run: Path) -> str:
    """SHA-256 of the command of a stage of the run in this directory, wherever that is, and of the code revision."""
    parts = [code_revision(), *(without_location(_canonical(argument), run) for argument in command)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _canonical(argument: str) -> Any:
    """The argument without what changes no result: the budget, what was measured of an input, and the order of keys in executor input."""
    try:
        content = json.loads(without_budget(argument))
    except ValueError:
        return argument
    inputs = content.get("inputs") if isinstance(content, dict) else None
    if not isinstance(inputs, dict):
        return content
    values = inputs.get("parameterValues")
    if isinstance(values, dict) and isinstance(values.get("settings"), str):
        values["settings"] = without_budget(values["settings"])
    for listed in inputs.get("artifacts", {}).values():
        for artifact in listed.get("artifacts", []):
            # The digest covers everything but measurements, such as the memory of the process that wrote the artifact.
            if "digest" in artifact.get("metadata", {}):
                artifact["metadata"] = {"digest": artifact["metadata"]["digest"]}
    return content


def write_json_atomic(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old or the new content, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _file_digests(root: Path, run: Path) -> dict[str, str]:
    """SHA-256 of every file under root; of the executor output without the location of the run."""
    digests = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digests[path.relative_to(root).as_posix()] = sha256_of(path)
    try:
        content = without_location(json.loads((root / OUTPUT).read_text(encoding="utf-8")), run)
    except (OSError, ValueError):
        return digests
    return digests | {OUTPUT: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _copy_output(source: Path, target: Path, old: Path, new: Path) -> None:
    """Write an executor output of a run in the directory old as that of a run in new, in a file of its own."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except ValueError:
        return  # and the digest of the file differs
    write_json_atomic(target, moved(content, old, new))


def _link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
        shutil.copy2(source, target)


def _read_entry(path: Path) -> dict[str, Any]:
    """What is recorded of a finished stage; {} if nothing can be read."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return entry if isinstance(entry["record"], dict) and isinstance(entry["run"], str) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
