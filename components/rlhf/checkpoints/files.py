"""What one checkpoint is made of: shards, a state, a manifest with the digest of each, and a marker that comes last.

KEY/step-00000012-4f1c09ab/actor/engine-00000.safetensors   one a process and engine
                           state.json                       what is not a tensor
                           shards-00000.json                digests of one process's shards
                           manifest.json                    sha256 and size of all of these
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
LIMIT = 256 * 2**20  # bytes of a manifest or a state; histories of long runs are some MiB
STEP = re.compile(r"step-(\d{8})-[0-9a-f]{8}")
FILE = re.compile(r"[a-z_]+/engine-\d{5}\.safetensors|state\.json")
OURS = re.compile(r"manifest\.json|\.complete|shards-\d{5}\.json")  # beside what the manifest lists
WAIT_SECONDS = 600.0  # of the first process for the shards of the others

Entry = tuple[str, int]  # sha256, size in bytes
ENTRIES_TYPE = TypeAdapter(dict[str, Entry])


@dataclass(frozen=True)
class Shards:
    """The share of one process: engine -> name -> tensor in main memory."""

    rank: int
    world_size: int
    tensors: Mapping[str, Mapping[str, Tensor]]


def write_checkpoint(store: Store, folder: str, shards: Shards, state: str) -> None:
    """Write the share of this process; the first one waits for those of the others and completes the checkpoint."""
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
    """Folders of all checkpoints under a key, complete or not, the newest first."""
    names = {path.removeprefix(f"{key}/").split("/")[0] for path in store.list(key)}
    return [f"{key}/{name}" for name in sorted(names, reverse=True) if STEP.fullmatch(name)]


def is_complete(store: Store, folder: str) -> bool:
    return store.read(f"{folder}/{COMPLETE}", limit=LIMIT) is not None


def fetch_checkpoint(store: Store, folder: str, into: Path) -> tuple[Path, dict[str, Any]]:
    """A local folder with the verified files of a checkpoint, and its state; into is used where the store is elsewhere.

    Raises InputError that says what is wrong with it.
    """
    entries = _manifest(store, folder)
    local = local_folder(store, folder, into)
    if local is not into:  # an engine may read every shard that it finds
        names = {name.removeprefix(f"{folder}/") for name in store.list(folder)} - entries.keys()
        strange = next((name for name in sorted(names) if not OURS.fullmatch(name)), None)
        if strange is not None:
            raise InputError(f"it holds {strange[:80]!a}, which its {MANIFEST} does not list")
    for name, (sha256, size) in entries.items():
        path = local / name
        if local is into:
            store.download(f"{folder}/{name}", path)
        if Path(os.path.realpath(path)) != Path(os.path.realpath(local)) / name:
            raise InputError(f"{name} is reached over a link")
        if not path.is_file():
            raise InputError(f"{name} is missing")
        if path.stat().st_size != size:
            raise InputError(f"{name} has {path.stat().st_size} bytes instead of {size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise InputError(f"the sha256 of {name} is not that of its manifest")
    if entries[STATE][1] > LIMIT:
        raise InputError(f"{STATE} is longer than {LIMIT} bytes")
    try:
        state = parse_json((local / STATE).read_bytes())
        return local, {**state, "step": int(state["step"])}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{STATE} cannot be read ({str(error)[:200]})") from None


def local_folder(store: Store, folder: str, into: Path) -> Path:
    """Where the files of a checkpoint lie on this machine once they are fetched."""
    return store.folder / folder if isinstance(store, FolderStore) else into


def _manifest(store: Store, folder: str) -> dict[str, Entry]:
    if not is_complete(store, folder):
        raise InputError(f"it has no {COMPLETE}: its writing was interrupted")
    try:
        entries = parse_json_as(ENTRIES_TYPE, store.read(f"{folder}/{MANIFEST}", limit=LIMIT) or b"")
    except NotJsonError:
        raise InputError(f"its {MANIFEST} cannot be read") from None
    strange = next((name for name in entries if not FILE.fullmatch(name)), None)
    if strange is not None:
        raise InputError(f"its {MANIFEST} names {strange[:80]!a}, which is no file of a checkpoint")
    if STATE not in entries:
        raise InputError(f"its {MANIFEST} lacks {STATE}")
    return entries


def _put(store: Store, key: str, tensors: Mapping[str, Tensor]) -> Entry:
    """Write one shard; in a folder straight to its place, because nothing counts before the marker."""
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
        raise InputError(f"another process could not write its share: {content['error']}")
    return {name: (sha256, size) for name, (sha256, size) in content.items()}
