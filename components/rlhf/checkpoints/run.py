"""The folder of a run's checkpoints in a store, and its deletion at the end of the run.

The folder contains a marker, without which it is never deleted: a store may hold data of others.
"""

import json

from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

MARKER = "checkpoints-of-run.json"
LIMIT = 10_000  # bytes


def run_prefix(run_id: str) -> str:
    """The folder of a run's checkpoints. Raises InputError for an id that is not the name of a folder."""
    if not run_id or run_id in (".", "..") or "/" in run_id or not run_id.isprintable():
        raise InputError(
            f"RLHF_RUN_ID is {run_id!r}, which cannot be the name of a folder; set it to the id of the run."
        )
    return f"run-{run_id}"


def mark_run(store: Store, run_id: str) -> None:
    """Write the marker of a run's folder."""
    try:
        store.write(f"{run_prefix(run_id)}/{MARKER}", json.dumps({"run_id": run_id}).encode())
    except OSError as error:
        raise InputError(
            f"{store.uri} cannot be written ({error.strerror}); free some space, or correct storage.checkpoint_uri."
        ) from None


def delete_run_if_empty(store: Store, run_id: str) -> None:
    """Delete the folder of a run that holds only its marker."""
    prefix = run_prefix(run_id)
    if set(store.list(prefix)) == {f"{prefix}/{MARKER}"}:
        store.delete(prefix)


def delete_run(store: Store, run_id: str) -> bool:
    """Delete the folder of a run's checkpoints, if it has the marker of this run; return whether it had."""
    prefix = run_prefix(run_id)
    if not has_marker(store, prefix):
        return False
    store.delete(prefix)
    return True


def has_marker(store: Store, folder: str) -> bool:
    """Whether a folder of the store is that of the checkpoints of a run, and has its marker."""
    try:
        content = parse_json(store.read(f"{folder}/{MARKER}", limit=LIMIT) or b"null")
    except NotJsonError:
        content = None
    return isinstance(content, dict) and f"run-{content.get('run_id')}" == folder
