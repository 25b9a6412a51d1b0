"""The storage that a task and the pods of its TrainJob share: a bucket, or a volume that all of them mount at the same path.

Below the folder of the run's checkpoints, whose deletion covers it:

    inputs/sha256-DIGEST/      an input artifact, under the digest of its manifest
    outputs/STAGE/files/NAME   an output: a file, or the files of a folder
    outputs/STAGE/delivered.json   written last
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from components.rlhf.artifacts.directory import atomic_directory
from components.rlhf.artifacts.manifest import MANIFEST, FileEntry, list_files, read_manifest, sha256_of
from components.rlhf.checkpoints.run import run_prefix
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError, RetryableError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as

DELIVERED, EXECUTOR_OUTPUT = "delivered.json", "executor_output.json"
LIMIT = 2**24  # bytes of a small file
Log = Callable[[str], None]


@dataclass(frozen=True)
class Delivery:
    """What the pods of a job have left behind."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    job: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # digest of the job's specification
    outputs: Mapping[str, Mapping[str, FileEntry]]  # name -> path within it -> entry; the path of an output file is ""


DELIVERY = TypeAdapter(Delivery)


def inputs_key(run_id: str, digest: str) -> str:
    return f"{run_prefix(run_id)}/inputs/sha256-{digest}"


def outputs_key(run_id: str, stage: str) -> str:
    return f"{run_prefix(run_id)}/outputs/{stage}"


def upload_input(store: Store, run_id: str, folder: Path, log: Log) -> str:
    """Copy an input artifact to the store unless it is there; return its key. The manifest is copied last.

    Two tasks may copy the same artifact at once: they write the same content, each file atomically.
    """
    manifest = read_manifest(folder)
    key = inputs_key(run_id, manifest.digest)
    if store.read(f"{key}/{MANIFEST}", limit=LIMIT) is not None:
        return key
    there = store.list(key)
    files = list_files(folder)
    missing = {name: path for name, path in files.items() if there.get(f"{key}/{name}") != path.stat().st_size}
    log(f"copying {folder.name} to {store.uri}/{key} ({sum(p.stat().st_size for p in missing.values()) / 1e6:,.0f} MB)")
    for name, path in missing.items():
        store.upload(path, f"{key}/{name}")
    store.upload(folder / MANIFEST, f"{key}/{MANIFEST}")
    return key


def deliver(store: Store, key: str, job: str, outputs: Mapping[str, Path], executor_output: Path | None) -> None:
    """Copy the outputs of a stage to the store: called in the pods, by the process of rank 0."""
    store.delete(key)
    entries: dict[str, dict[str, FileEntry]] = {}
    for name, path in outputs.items():
        if not path.exists():
            continue
        entries[name] = {relative: _entry(file) for relative, file in _files(path).items()}
        for relative, file in _files(path).items():
            store.upload(file, _file_key(key, name, relative))
    if executor_output is not None and executor_output.is_file():
        store.upload(executor_output, f"{key}/{EXECUTOR_OUTPUT}")
    store.write(f"{key}/{DELIVERED}", json.dumps(asdict(Delivery(job, entries))).encode())


def read_delivery(store: Store, key: str, job: str) -> Delivery | None:
    """The delivery of the job with this digest; None if there is none, or that of another job."""
    data = store.read(f"{key}/{DELIVERED}", limit=LIMIT)
    if data is None:
        return None
    try:
        delivery = parse_json_as(DELIVERY, data)
    except NotJsonError as error:
        raise InputError(f"{store.uri}/{key}/{DELIVERED} cannot be read ({error}); delete it.") from None
    return delivery if delivery.job == job else None


def collect(store: Store, key: str, delivery: Delivery, outputs: Mapping[str, Path]) -> None:
    """Copy the outputs of a delivery to the paths of the task. Raises RetryableError for a file that is not what was delivered."""
    for name, path in outputs.items():
        entries = delivery.outputs.get(name)
        if entries is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if set(entries) == {""}:
            _download(store, _file_key(key, name, ""), entries[""], path)
            continue
        with atomic_directory(path) as draft:
            for relative, entry in entries.items():
                _download(store, _file_key(key, name, relative), entry, draft / _require_inside(relative, store, key))


def write_executor_output(store: Store, key: str, executor_input: str) -> None:
    """Write KFP's executor output of this task from that of the job, whose task may have been another attempt with other URIs."""
    data = store.read(f"{key}/{EXECUTOR_OUTPUT}", limit=LIMIT)
    if data is None:
        raise RetryableError(f"{store.uri}/{key} has no {EXECUTOR_OUTPUT}; the stage runs again.")
    outputs = json.loads(executor_input)["outputs"]
    own = {name: entry["artifacts"][0] for name, entry in outputs.get("artifacts", {}).items()}
    artifacts: dict[str, Any] = json.loads(data)["artifacts"]
    uris = {artifacts[name]["artifacts"][0]["uri"]: entry["uri"] for name, entry in own.items() if name in artifacts}
    for name, entry in own.items():
        if name in artifacts:
            metadata = artifacts[name]["artifacts"][0]["metadata"]
            metadata = {k: uris.get(v, v) if isinstance(v, str) else v for k, v in metadata.items()}
            artifacts[name] = {"artifacts": [{"name": entry["name"], "uri": entry["uri"], "metadata": metadata}]}
    target = Path(outputs["outputFile"])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.writing")
    temporary.write_text(json.dumps({"artifacts": artifacts}, allow_nan=False), encoding="utf-8")
    temporary.replace(target)


def delete_exchange(store: Store, run_id: str) -> None:
    """Delete inputs and outputs of all stages of a run."""
    for name in ("inputs", "outputs"):
        store.delete(f"{run_prefix(run_id)}/{name}")


def download_input(store: Store, key: str, target: Path) -> None:
    """Copy an input artifact from the store; called in the pods. The stage verifies it when it opens it."""
    if target.is_dir():
        return
    keys = store.list(key)
    if f"{key}/{MANIFEST}" not in keys:
        raise InputError(
            f"{store.uri}/{key} has no {MANIFEST}: this node does not see what the task has copied there; use storage that all nodes share."
        )
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in keys:
        store.download(name, temporary / _require_inside(name.removeprefix(f"{key}/"), store, key))
    temporary.rename(target)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"": path}
    manifest = {MANIFEST: path / MANIFEST} if (path / MANIFEST).is_file() else {}
    return list_files(path) | manifest


def _entry(file: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(file), size=file.stat().st_size)


def _file_key(key: str, name: str, relative: str) -> str:
    return f"{key}/files/{name}" + (f"/{relative}" if relative else "")


def _download(store: Store, key: str, entry: FileEntry, file: Path) -> None:
    store.download(key, file)
    if file.stat().st_size != entry.size or sha256_of(file) != entry.sha256:
        raise RetryableError(
            f"{store.uri}/{key} is not what the stage has written (sha256 differs); the task tries again."
        )


def _require_inside(relative: str, store: Store, key: str) -> str:
    parts = PurePosixPath(relative).parts
    if not parts or relative.startswith("/") or ".." in parts or "\\" in relative or "\0" in relative:
        raise InputError(
            f"{store.uri}/{key} lists {relative[:200]!a}, which leads out of its folder; do not trust this storage."
        )
    return relative
