"""Saving and restoring the checkpoints of one stage."""

import contextlib
import json
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from components.rlhf.checkpoints import files
from components.rlhf.checkpoints.lease import Lease
from components.rlhf.checkpoints.spend import Ledger
from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SINGLE_PROCESS, local_rank, node_rank
from components.rlhf.engine.protocol import Group, TrainEngine
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError, NonFiniteError

MAX_FAILURES = 3  # in a row, after which training ends


class CheckpointManager:
    """Checkpoints under store/key. Without a store nothing is saved or found.

    key must change with everything that affects training (settings, inputs), so that no run continues another by accident.
    All ranks save and restore together. A save copies the engines' tensors to main memory (with Adam three times the trained
    weights in fp32) and returns; a thread writes them, and the next save waits for that thread.
    """

    def __init__(
        self,
        store: Store | None,
        key: str,
        config: CheckpointConfig,
        group: Group = SINGLE_PROCESS,
        log: Callable[[str], None] = lambda _: None,
        stop: StopSignal | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """ledger is that of rank 0, if the run has a budget."""
        self.ledger = ledger
        self.store, self.key, self.config, self.group, self.log = store, key, config, group, log
        self.stop = stop or StopSignal()
        self.num_saves = 0
        self._latest: str | None = None
        self._lease = Lease(store, f"{key}/lease.json", log) if store and group.rank == 0 else None
        self._last = time.monotonic()
        self._stopping = self._over_budget = False
        self._failures = 0
        self._writer: threading.Thread | None = None
        self._outcome: str | Exception = ""

    @property
    def latest(self) -> str | None:
        """URI of the latest checkpoint that is known to be complete."""
        self._collect_finished_save()
        return self._latest

    def should_save(self) -> bool:
        """Whether every_minutes have passed since the last save (or the start), or the stage must end: by a signal, or its budget."""
        if self.store is None:
            return False
        self._collect_finished_save()
        if self._lease:
            self._lease.check()
        # All ranks must decide alike, but their clocks differ and signals reach them at different moments.
        is_due = time.monotonic() - self._last >= 60 * self.config.every_minutes
        is_exhausted = self.ledger is not None and self.ledger.is_exhausted()
        decision = self.group.max_int(3 if is_exhausted else 2 if self.stop.signal else int(is_due))
        self._stopping, self._over_budget = decision >= 2, decision == 3
        return decision > 0

    def save(self, step: int, engines: Mapping[str, TrainEngine], state: Mapping[str, Any]) -> None:
        """Save every engine and a JSON state under this step. If the stage must end, wait until it is written and exit.

        A failed save is logged; raises InputError after MAX_FAILURES in a row, and when the budget is spent.
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
        self.num_saves += 1
        if self._stopping:
            self.wait()
            self.group.barrier()
            if self._lease:
                self._lease.release()
            if self._over_budget:
                self._end_over_budget()
            self.log(f"saved step {step} and exiting on {self.stop.name}; the stage resumes from it when started again")
            sys.exit(self.stop.exit_code)

    def require_budget(self) -> None:
        """Raise InputError on every rank if earlier attempts and stages have spent the budget. Every rank calls it."""
        if self.group.max_int(int(self.ledger is not None and self.ledger.is_exhausted())):
            self._end_over_budget()

    def _end_over_budget(self) -> NoReturn:
        message = ""
        if self.ledger:
            assert self.store is not None
            self.ledger.close()
            latest = files.find_latest(self.store, self.key)
            kept = "no checkpoint of this stage has been saved"
            if latest:
                kept = f"the checkpoint after step {files.step_of(latest)} is kept in {self.store.uri}/{latest}"
            message = self.ledger.message(kept)
        raise InputError(self.group.gather([message])[0])

    def restore(self, engines: Mapping[str, TrainEngine]) -> dict[str, Any] | None:
        """Load the latest checkpoint that verifies into the engines; return its state with its step, or None if there is none.

        Takes the lease: raises InputError while another process writes under this key. Checkpoints that do not verify are
        skipped, and the reason is logged.
        """
        if self.store is None:
            return None
        if self._lease:
            self._lease.acquire()
        self.stop.defer()
        with tempfile.TemporaryDirectory(prefix="rlhf-checkpoint-") as own:
            # All ranks of a machine use the folder of its first one, which downloads; another machine does not have that folder.
            into = Path(next(path for node, path in self.group.gather([(node_rank(), own)]) if node == node_rank()))
            found: str | None = None
            for folder in self.group.gather(
                files.list_checkpoints(self.store, self.key) if self.group.rank == 0 else []
            ):
                # Every rank loads the files; the first rank of each machine downloads and verifies them.
                problem, local, state = self._fetch(folder, into / folder.rpartition("/")[2])
                problems = [p for p in self.group.gather([problem]) if p]
                if not problems:
                    found = folder
                    break
                self.log(f"checkpoint {folder.rpartition('/')[2]} is skipped: {problems[0]}")
            if found is None:
                return None
            for name, engine in engines.items():
                self._load(engine, local / name, found)
            self.group.barrier()
        self._latest = f"{self.store.uri}/{found}"
        shared: dict[str, Any] = self.group.gather([state])[0]  # of the rank that downloaded it
        return shared

    def _load(self, engine: TrainEngine, directory: Path, folder: str) -> None:
        """Raises InputError for files that match their manifest but are not a snapshot of this engine."""
        try:
            engine.load(directory)
        except (SafetensorError, FileNotFoundError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and self.group.world_size > 1:
                raise  # more likely that another rank died
            raise InputError(
                f"checkpoint {folder} verifies, but its {directory.name} cannot be loaded ({str(error)[:200] or type(error).__name__}); "
                "delete it to use the previous one."
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
        """Delete this stage's checkpoints, after its artifact has been written."""
        if self.store is None or self.group.rank > 0:
            return
        self.wait()
        if self._lease:
            self._lease.release()
        self.store.delete(self.key)

    def release(self) -> None:
        """Release the lease, so that another attempt need not wait until this process is known to be dead. Idempotent."""
        if self._lease:
            self._lease.release()

    def _fetch(self, folder: str, into: Path) -> tuple[str, Path, dict[str, Any]]:
        """The problem ("" if none), the local folder, and the state (on the rank that downloads)."""
        assert self.store is not None
        if local_rank() > 0:
            return "", files.local_folder(self.store, folder, into), {}
        try:
            local, state = files.fetch_checkpoint(self.store, folder, into)
        except InputError as error:
            return str(error), into, {}
        return "", local, state

    def _write(self, name: str, shards: files.Shards, state: str) -> None:
        """Runs in the writer thread."""
        assert self.store is not None
        try:
            files.write_checkpoint(self.store, f"{self.key}/{name}", shards, state)
            if shards.rank == 0:
                self._prune(newest=name)
            self._outcome = name
        except Exception as error:  # a store may raise anything; wait() reports it
            self._outcome = error

    def _prune(self, newest: str) -> None:
        """Keep this checkpoint and the complete ones before it, `keep` in total; delete the others."""
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

    def _collect_finished_save(self) -> None:
        if self._writer is not None and not self._writer.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the writer thread and handle its outcome."""
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        if isinstance(self._outcome, Exception):
            self._failures += 1
            reason = str(self._outcome) or type(self._outcome).__name__
            if self._failures >= MAX_FAILURES:
                raise InputError(
                    f"{self._failures} checkpoints in a row could not be written to {self.key} ({reason}); free some "
                    "space or repair the store, and start the stage again."
                )
            self.log(f"a checkpoint could not be written; training continues without it ({reason})")
        else:
            self._failures = 0
            assert self.store is not None
            self._latest = f"{self.store.uri}/{self.key}/{self._outcome}"
