"""Loading the files of a checkpoint into engines, on every rank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from components.rlhf.checkpoints import files
from components.rlhf.engine.group import local_rank, node_rank
from components.rlhf.engine.protocol import Group, Saved
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError


def shared_folder(own: str, group: Group) -> Path:
    """The folder of the first rank of this machine, of which every rank passes one of its own: that rank downloads for all."""
    return Path(next(path for node, path in group.gather([(node_rank(), own)]) if node == node_rank()))


def load_folder(
    store: Store, folder: str, engines: Mapping[str, Saved], into: Path, group: Group
) -> tuple[str, dict[str, Any]]:
    """Load a checkpoint that verifies into the engines. Returns the problem if it does not ("" otherwise), and its state.

    Every rank calls it and gets the same. The first rank of each machine downloads and verifies the files.
    """
    problem, local, state = _fetch(store, folder, into / folder.rpartition("/")[2])
    problems = [p for p in group.gather([problem]) if p]
    if problems:
        return problems[0], {}
    for name, engine in engines.items():
        _load(engine, local / name, folder, group)
    shared: dict[str, Any] = group.gather([state])[0]  # of the rank that downloaded it
    return "", shared


def _fetch(store: Store, folder: str, into: Path) -> tuple[str, Path, dict[str, Any]]:
    """The problem ("" if none), the local folder, and the state (on the rank that downloads)."""
    if local_rank() > 0:
        return "", files.local_folder(store, folder, into), {}
    try:
        local, state = files.fetch_checkpoint(store, folder, into)
    except InputError as error:
        return str(error), into, {}
    return "", local, state


def _load(engine: Saved, directory: Path, folder: str, group: Group) -> None:
    """Raises InputError for files that match their manifest but are not a snapshot of this engine."""
    try:
        engine.load(directory)
    except (SafetensorError, FileNotFoundError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and group.world_size > 1:
            raise  # more likely that another rank died
        raise InputError(
            f"checkpoint {folder} verifies, but its {directory.name} cannot be loaded ({str(error)[:200] or type(error).__name__}); "
            "delete it to use the previous one."
        ) from error
