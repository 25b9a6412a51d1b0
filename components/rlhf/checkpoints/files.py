"""The files of one checkpoint: shards, a state, a manifest with their digests, and a marker that is written last.

KEY/step-00000012-4f1c09ab/actor/engine-00000.safetensors   one per rank and engine
                           state.json                       everything that is not a tensor
                           shards-00000.json                digests of one rank's shards
                           manifest.json                    sha256 and size of the files above
                           .complete                        written last
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from components.rlhf.storage.store import FolderStore, Store
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json, parse_json_as

COMPLETE, MANIFEST, STATE = ".complete", "manifest.json", "state.json"
LIMIT = 256 * 2**20  # bytes of a manifest or a state; the history of a long run takes some MiB
STEP = re.compile(r"step-\d{8}-[0-9a-f]{8}")  # a checkpoint
NAME = re.compile(r"([a-z]+)-\d{8}-[0-9a-f]{8}")  # a checkpoint, or a kept state, such as best-00000012-4f1c09ab
FILE = re.compile(r"[a-z_]+/engine-\d{5}\.safetensors|state\.json")
OURS = re.compile(r"manifest\.json|\.complete|shards-\d{5}\.json")  # files that the manifest does not list
WAIT_SECONDS = 600.0  # that rank 0 waits for the shards of the other ranks

Entry = tuple[str, int]  # sha256, size in bytes
ENTRIES_TYPE = TypeAdapter(dict[str, Entry])


@dataclass(frozen=True)
class Shards:
    """One rank's part of a checkpoint: engine -> name -> tensor in main memory."""

    rank: int
    world_size: int
    tensors: Mapping[str, Mapping[str, Tensor]]


def write_checkpoint(store: Store, folder: str, shards: Shards, state: str) -> None:
    """Write this rank's shards. Rank 0 then waits for the other ranks and completes the checkpoint."""
    try:
        entries = {
            name: _put(store, f"{folder}/{name}", tensors)
            for engine, tensors in shards.tensors.items()
            for name in (f"{engine}/engine-{shards.rank:05d}.safetensors",)
            if tensors
        }
    except Exception as error:
        report = {"error": str(error) or type(error).__name__}
        store.write(f"{folder}/shards-{shards.rank:05d}.json", json.dumps(report).encode())
        raise
    store.write(f"{folder}/shards-{shards.rank:05d}.json", json.dumps(entries).encode())
    if shards.rank > 0:
        return
    for rank in range(1, shards.world_size):
        entries |= _wait_for(store, f"{folder}/shards-{rank:05d}.json")
    text = state.encode()
    store.write(f"{folder}/{STATE}", text)
    entries[STATE] = (hashlib.sha256(text).hexdigest(), len(text))
    store.write(f"{folder}/{MANIFEST}", json.dumps(entries, indent=1, sort_keys=True).encode())
    store.write(f"{folder}/{COMPLETE}", b"")


def list_checkpoints(store: Store, key: str) -> list[str]:
    """Folders of all checkpoints under a key, complete or not, latest first."""
    return [f"{key}/{name}" for name in reversed(_names(store, key)) if STEP.fullmatch(name)]


def list_kept(store: Store, key: str) -> list[str]:
    """Names of the folders of all kept states under a key, complete or not."""
    return [name for name in _names(store, key) if NAME.fullmatch(name) and not STEP.fullmatch(name)]


def _names(store: Store, key: str) -> list[str]:
    return sorted({path.removeprefix(f"{key}/").split("/")[0] for path in store.list(key)})


def is_complete(store: Store, folder: str) -> bool:
    return store.read(f"{folder}/{COMPLETE}", limit=LIMIT) is not None


def find_latest(store: Store, key: str) -> str | None:
    """The folder of the latest complete checkpoint under a key, which is not verified here."""
    return next((folder for folder in list_checkpoints(store, key) if is_complete(store, folder)), None)


def step_of(folder: str) -> int:
    """The step of a checkpoint or a kept state, from the name of its folder."""
    return int(folder.rpartition("/")[2].split("-")[1])


def fetch_checkpoint(store: Store, folder: str, into: Path) -> tuple[Path, dict[str, Any]]:
    """A local folder with the verified files of a checkpoint, and its state. Files of a remote store are downloaded to `into`.

    Raises InputError with the first problem found.
    """
    entries = _manifest(store, folder)
    local = local_folder(store, folder, into)
    if local is not into:  # an engine loads every shard in the folder
        names = {name.removeprefix(f"{folder}/") for name in store.list(folder)} - entries.keys()
        unexpected = next((name for name in sorted(names) if not OURS.fullmatch(name)), None)
        if unexpected is not None:
            raise InputError(f"it contains {unexpected[:80]!a}, which its {MANIFEST} does not list")
    for name, (sha256, size) in entries.items():
        path = local / name
        if local is into:
            store.download(f"{folder}/{name}", path)
        if Path(os.path.realpath(path)) != Path(os.path.realpath(local)) / name:
            raise InputError(f"{name} is reached through a symbolic link")
        if not path.is_file():
            raise InputError(f"{name} is missing")
        if path.stat().st_size != size:
            raise InputError(f"{name} has {path.stat().st_size} bytes, expected {size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise InputError(f"the sha256 of {name} does not match its manifest")
    if entries[STATE][1] > LIMIT:
        raise InputError(f"{STATE} is larger than {LIMIT} bytes")
    try:
        state = parse_json((local / STATE).read_bytes())
        return local, {**state, "step": int(state["step"])}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{STATE} cannot be read ({str(error)[:200]})") from None


def local_folder(store: Store, folder: str, into: Path) -> Path:
    """Where the files of a checkpoint are on this machine once they are downloaded."""
    return store.folder / folder if isinstance(store, FolderStore) else into


def _manifest(store: Store, folder: str) -> dict[str, Entry]:
    if not is_complete(store, folder):
        raise InputError(f"it has no {COMPLETE}: writing it was interrupted")
    try:
        entries = parse_json_as(ENTRIES_TYPE, store.read(f"{folder}/{MANIFEST}", limit=LIMIT) or b"")
    except NotJsonError:
        raise InputError(f"its {MANIFEST} cannot be read") from None
    unexpected = next((name for name in entries if not FILE.fullmatch(name)), None)
    if unexpected is not None:
        raise InputError(f"its {MANIFEST} names {unexpected[:80]!a}, which is not a checkpoint file")
    if STATE not in entries:
        raise InputError(f"its {MANIFEST} lacks {STATE}")
    return entries


def _put(store: Store, key: str, tensors: Mapping[str, Tensor]) -> Entry:
    """Write one shard. In a folder it is written in place, because a checkpoint without its marker is ignored."""
    if isinstance(store, FolderStore):
        path = store.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path)
        return _entry(path)
    with tempfile.TemporaryDirectory(prefix="rlhf-checkpoint-") as folder:
        path = Path(folder) / "shard"
        save_file(dict(tensors), path)
        store.upload(path, key)
        return _entry(path)


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def _wait_for(store: Store, key: str) -> dict[str, Entry]:
    deadline = time.monotonic() + WAIT_SECONDS
    while (text := store.read(key, limit=LIMIT)) is None:
        if time.monotonic() > deadline:
            raise InputError(f"{key} was not written within {WAIT_SECONDS / 60:.0f} minutes")
        time.sleep(0.2)
    content = json.loads(text)
    if "error" in content:
        raise InputError(f"another rank could not write its shards: {content['error']}")
    return {name: (sha256, size) for name, (sha256, size) in content.items()}
