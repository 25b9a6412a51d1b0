"""States that a stage keeps beside its checkpoints under a name, such as its best weights, until another one takes the name.

KEY/best-00000012-4f1c09ab/    the files of a checkpoint, without the optimizer's moments if only the weights matter

A checkpoint names the kept states of its moment, and they are not deleted before it: a run that resumes from it finds them.
"""

from typing import Any

from components.rlhf.checkpoints import files
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

KEY = "kept"  # of the state of a checkpoint


class KeptStates:
    """Which folder has each kept state, and which folders checkpoints refer to. Only that of rank 0 counts."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}  # name of a state -> name of its folder
        self._pinned: dict[str, set[str]] = {}  # name of a checkpoint -> folders that it needs

    def pin(self, checkpoint: str) -> dict[str, Any]:
        """Note that a checkpoint needs the present states; returns what it adds to the checkpoint's own state."""
        self._pinned[checkpoint] = set(self.folders.values())
        return {KEY: dict(self.folders)} if self.folders else {}

    def read(self, store: Store, key: str, restored: dict[str, Any]) -> None:
        """Take over the states that a restored checkpoint names, and note what the other checkpoints need. Removes KEY from its state."""
        self.folders = folders_in(restored)
        restored.pop(KEY, None)
        for folder in files.list_checkpoints(store, key):
            try:
                state = parse_json(store.read(f"{folder}/{files.STATE}", limit=files.LIMIT) or b"{}")
            except (NotJsonError, InputError):  # a checkpoint that cannot be read needs nothing
                continue
            self._pinned[folder.rpartition("/")[2]] = set(folders_in(state).values())

    def delete_unused(self, store: Store, key: str, *, written: str = "") -> None:
        """Delete what neither a checkpoint in the store nor the run needs. written is a state whose folder is complete now."""
        left = {folder.rpartition("/")[2] for folder in files.list_checkpoints(store, key)}
        self._pinned = {name: folders for name, folders in self._pinned.items() if name in left}
        current = {name: folder for name, folder in self.folders.items() if name != slot_of(written)}
        needed = set().union({written}, current.values(), *self._pinned.values())
        for name in files.list_kept(store, key):
            if name not in needed:
                store.delete(f"{key}/{name}")


def folders_in(state: Any) -> dict[str, str]:
    """The kept states that the state of a checkpoint names. It is not trusted to name folders of their own below its key."""
    found = state.get(KEY) if isinstance(state, dict) else None
    return {
        name: folder
        for name, folder in (found.items() if isinstance(found, dict) else ())
        if isinstance(folder, str) and files.NAME.fullmatch(folder) and slot_of(folder) == name
    }


def slot_of(folder: str) -> str:
    """The name of the state that a folder has: best of best-00000012-4f1c09ab, and step of a checkpoint."""
    return folder.partition("-")[0]
