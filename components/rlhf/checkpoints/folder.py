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
from components.rlhf.engine.protocol import TrainEngine

COMPLETE = ".complete"


class CheckpointFolder:
    """Checkpoints `step-00000012/` under root/key. Without a root nothing is saved or found.

    key must change with whatever alters training (settings, inputs), so that no run continues another by accident.
    """

    def __init__(self, root: Path | None, key: str, settings: CheckpointSettings) -> None:
        self.folder = root / key if root else None
        self.settings = settings
        self._last = time.monotonic()
        self.newest: Path | None = None

    def due(self) -> bool:
        """Whether the last checkpoint (or the start) is longer ago than the settings allow."""
        return self.folder is not None and time.monotonic() - self._last >= 60 * self.settings.every_minutes

    def save(self, step: int, engines: Mapping[str, TrainEngine], state: Mapping[str, Any]) -> None:
        """Save every engine and a JSON state under this step, then drop all but the newest `keep`."""
        if self.folder is None:
            return
        draft = self.folder / f".writing-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        for name, engine in engines.items():
            engine.save(draft / name)
        (draft / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        (draft / COMPLETE).touch()
        final = self.folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        self.newest = final
        self._last = time.monotonic()
        for old in self._complete()[: -self.settings.keep]:
            shutil.rmtree(old)

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
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("step-*") if (path / COMPLETE).is_file())
