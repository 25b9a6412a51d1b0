"""Checkpoints of one stage in a folder: written whole or not at all, the newest complete one found again.

Law of this room: the engine protocol and files; no word of PPO. A checkpoint is not an artifact: it is for the same stage of
the same run, and is deleted when the stage ends well.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.rlhf.config.storage import CheckpointSettings
from components.rlhf.engine.group import ALONE
from components.rlhf.engine.protocol import Group, TrainEngine

COMPLETE = ".complete"


class CheckpointFolder:
    """Checkpoints `step-00000012/` under root/key. Without a root nothing is saved or found.

    key must change with whatever alters training (settings, inputs), so that no run continues another by accident.
    All processes of a group save and restore together, and see the same folder.
    """

    def __init__(self, root: Path | None, key: str, settings: CheckpointSettings, group: Group = ALONE) -> None:
        self.folder = root / key if root else None
        self.settings, self.group = settings, group
        self._last = time.monotonic()
        self.newest: Path | None = None

    def due(self) -> bool:
        """Whether the last checkpoint (or the start) is longer ago than the settings allow."""
        if self.folder is None:
            return False
        # Clocks differ between processes, and all must do the same.
        return self.group.max_int(time.monotonic() - self._last >= 60 * self.settings.every_minutes) > 0

    def save(self, step: int, engines: Mapping[str, TrainEngine], state: Mapping[str, Any]) -> None:
        """Save every engine and a JSON state under this step, then drop all but the newest `keep`."""
        if self.folder is None:
            return
        first = self.group.rank == 0
        owner = self.group.gather([os.getpid()])[0]
        draft, final = self.folder / f".writing-{owner}", self.folder / f"step-{step:08d}"
        if first:
            shutil.rmtree(draft, ignore_errors=True)
        self.group.barrier()
        for name, engine in engines.items():
            engine.save(draft / name)
        self.group.barrier()
        if first:
            (draft / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            (draft / COMPLETE).touch()
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            for old in self._complete()[: -self.settings.keep]:
                shutil.rmtree(old)
        self.group.barrier()
        self.newest = final
        self._last = time.monotonic()

    def restore(self, engines: Mapping[str, TrainEngine]) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the engines and return its state with its step, or None if there is none."""
        found = self._complete()
        if not found:
            return None
        self.newest = found[-1]
        for name, engine in engines.items():
            engine.load(self.newest / name)
        state: dict[str, Any] = json.loads((self.newest / "state.json").read_text(encoding="utf-8"))
        return state

    def clear(self) -> None:
        """Delete this stage's checkpoints: its artifact has been written."""
        if self.folder is not None and self.group.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("step-*") if (path / COMPLETE).is_file())
