"""Checkpoints of one stage: written whole or not at all, verified before they are believed, the newest good one found again.

Law of this room: the engine protocol and files; no word of PPO. A checkpoint is not an artifact: it is for the same stage of
the same run, and is deleted when the stage ends well.
"""

import contextlib
import json
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from components.rlhf.checkpoints import files
from components.rlhf.checkpoints.lease import Lease
from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SINGLE_PROCESS, local_rank
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError, NonFiniteError

MAX_FAILURES = 3  # saves in a row, after which going on would risk more than it gains


class CheckpointManager:
    """Checkpoints under store/key. Without a store nothing is saved or found.

    key must change with whatever alters training (settings, inputs), so that no run continues another by accident.
    All processes of a group save and restore together. A save copies what the engines hold into main memory (for Adam three
    times the trained weights in fp32) and returns; a thread writes it, and the next save waits until that has ended.
    """

    def __init__(
        self,
        store: Store | None,
        key: str,
        config: CheckpointConfig,
        group: Group = SINGLE_PROCESS,
        log: Callable[[str], None] = lambda _: None,
        stop: StopSignal | None = None,
    ) -> None:
        self.store, self.key, self.config, self.group, self.log = store, key, config, group, log
        self.stop = stop or StopSignal()
        self._latest: str | None = None
        self._lease = Lease(store, f"{key}/lease.json", log) if store and group.rank == 0 else None
        self._last = time.monotonic()
        self._stopping = False
        self._failures = 0
        self._writer: threading.Thread | None = None
        self._outcome: str | Exception = ""

    @property
    def latest(self) -> str | None:
        """Where the newest checkpoint lies that is known to be complete."""
        if self._writer is not None and not self._writer.is_alive():
            self.wait()
        return self._latest

    def should_save(self) -> bool:
        """Whether it is time to save: the last one (or the start) is longer ago than the settings allow, or a signal came."""
        if self.store is None:
            return False
        if self._lease:
            self._lease.check()
        # Clocks differ between processes and signals reach them at different moments, and all must do the same.
        late = time.monotonic() - self._last >= 60 * self.config.every_minutes
        wanted = self.group.max_int(2 if self.stop.signal else int(late))
        self._stopping = wanted == 2
        return wanted > 0

    def save(self, step: int, engines: Mapping[str, TrainEngine], state: Mapping[str, Any]) -> None:
        """Save every engine and a JSON state under this step. After a signal, wait until it is written and end the process.

        A save that fails is said and the training goes on; raises InputError after MAX_FAILURES in a row.
        """
        if self.store is None:
            return
        self.wait()
        name = self.group.gather([f"step-{step:08d}-{uuid.uuid4().hex[:8]}"])[0]
        tensors = {engine_name: engine.snapshot() for engine_name, engine in engines.items()}
        shards = files.Shards(self.group.rank, self.group.world_size, tensors)
        text = json.dumps({"step": step, **state})
        self._writer = threading.Thread(target=self._write, args=(name, shards, text), name="checkpoint", daemon=True)
        self._writer.start()
        self._last = time.monotonic()
        if self._stopping:
            self.wait()
            self.group.barrier()
            if self._lease:
                self._lease.release()
            self.log(f"saved step {step}; ending on {self.stop.name}, and going on from there when started again")
            sys.exit(self.stop.exit_code)

    def restore(self, engines: Mapping[str, TrainEngine]) -> dict[str, Any] | None:
        """Load the newest checkpoint that verifies into the engines; return its state with its step, or None if there is none.

        Takes the lease: raises InputError while another process writes under this key. Those that do not verify are passed
        over, and it says why.
        """
        if self.store is None:
            return None
        if self._lease:
            self._lease.acquire()
        self.stop.defer()
        with tempfile.TemporaryDirectory(prefix="rlhf-checkpoint-") as own:
            into = Path(self.group.gather([own])[0])
            found: str | None = None
            for folder in self.group.gather(
                files.list_checkpoints(self.store, self.key) if self.group.rank == 0 else []
            ):
                # Every process loads, and each machine needs the files; the first of each machine fetches and verifies.
                problem, local, state = self._fetch(folder, into / folder.rpartition("/")[2])
                problems = [p for p in self.group.gather([problem]) if p]
                if not problems:
                    found = folder
                    break
                self.log(f"checkpoint {folder.rpartition('/')[2]} is passed over: {problems[0]}")
            if found is None:
                return None
            for name, engine in engines.items():
                self._load(engine, local / name, found)
            self.group.barrier()
        self._latest = f"{self.store.uri}/{found}"
        shared: dict[str, Any] = self.group.gather([state])[0]  # of the process that fetched
        return shared

    def _load(self, engine: TrainEngine, directory: Path, folder: str) -> None:
        """Raises InputError for files that are what their manifest says, and yet not what an engine saves."""
        try:
            engine.load(directory)
        except (SafetensorError, FileNotFoundError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and self.group.world_size > 1:
                raise  # more likely another process that died
            raise InputError(
                f"checkpoint {folder} verifies, and its {directory.name} cannot be loaded ({str(error)[:200] or type(error).__name__}); "
                "delete it, and the one before it is used."
            ) from error

    @contextlib.contextmanager
    def named_on_failure(self) -> Iterator[None]:
        """Within the block a NonFiniteError becomes an InputError that names the latest checkpoint."""
        try:
            yield
        except NonFiniteError as error:
            latest = f"the latest checkpoint is {self.latest}" if self.latest else "no checkpoint had been saved yet"
            raise InputError(f"{error}; {latest}. Lower the learning rate, or inspect these records.") from None

    def delete_all(self) -> None:
        """Delete this stage's checkpoints: its artifact has been written."""
        if self.store is None or self.group.rank > 0:
            return
        self.wait()
        if self._lease:
            self._lease.release()
        self.store.delete(self.key)

    def _fetch(self, folder: str, into: Path) -> tuple[str, Path, dict[str, Any]]:
        """What is wrong ("" if nothing), where the files lie on this machine, and the state (of the process that fetched)."""
        assert self.store is not None
        if local_rank() > 0:
            return "", files.local_folder(self.store, folder, into), {}
        try:
            local, state = files.fetch_checkpoint(self.store, folder, into)
        except InputError as error:
            return str(error), into, {}
        return "", local, state

    def _write(self, name: str, shards: files.Shards, state: str) -> None:
        """In the thread."""
        assert self.store is not None
        try:
            files.write_checkpoint(self.store, f"{self.key}/{name}", shards, state)
            if shards.rank == 0:
                self._prune(newest=name)
            self._outcome = name
        except Exception as error:  # whatever a store may raise; the next save says it
            self._outcome = error

    def _prune(self, newest: str) -> None:
        """Keep this one and the complete ones before it, `keep` in all. What was interrupted or passed over goes."""
        assert self.store is not None
        kept = 1
        for folder in files.list_checkpoints(self.store, self.key):
            name = folder.rpartition("/")[2]
            if name == newest:
                continue
            before = name.rpartition("-")[0] < newest.rpartition("-")[0]
            if before and kept < self.config.keep and files.is_complete(self.store, folder):
                kept += 1
            else:
                self.store.delete(folder)

    def wait(self) -> None:
        """Until the thread has ended; then hear how it went."""
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        if isinstance(self._outcome, Exception):
            self._failures += 1
            reason = str(self._outcome) or type(self._outcome).__name__
            if self._failures >= MAX_FAILURES:
                raise InputError(
                    f"{self._failures} checkpoints in a row could not be written to {self.key} ({reason}); make room or "
                    "repair the store, and start again."
                )
            self.log(f"a checkpoint could not be written, going on without it ({reason})")
        else:
            self._failures = 0
            assert self.store is not None
            self._latest = f"{self.store.uri}/{self.key}/{self._outcome}"
