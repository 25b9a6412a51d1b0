"""Saving and restoring the checkpoints of one stage."""

import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from components.rlhf.checkpoints import files
from components.rlhf.checkpoints.kept import KEY, KeptStates, slot_of
from components.rlhf.checkpoints.lease import Lease
from components.rlhf.checkpoints.loading import load_folder, shared_folder
from components.rlhf.checkpoints.spend import Ledger
from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.storage import CheckpointConfig
from components.rlhf.engine.group import SINGLE_PROCESS, node_rank
from components.rlhf.engine.protocol import Group, Saved
from components.rlhf.storage.store import FolderStore, Store
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
        self._kept = KeptStates()
        self._temporary: FolderStore | None = None  # of kept states, in a run without a store

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

    def save(self, step: int, engines: Mapping[str, Saved], state: Mapping[str, Any]) -> None:
        """Save every engine and a JSON state under this step. If the stage must end, wait until it is written and exit.

        A failed save is logged; raises InputError after MAX_FAILURES in a row, and when the budget is spent.
        """
        if self.store is None:
            return
        self.wait()
        name = self._folder_name("step", step)
        self._save(name, engines, {"step": step, **self._kept.pin(name), **state})
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

    def _folder_name(self, name: str, step: int) -> str:
        return self.group.gather([f"{name}-{step:08d}-{uuid.uuid4().hex[:8]}"])[0]

    def _save(self, name: str, engines: Mapping[str, Saved], state: Mapping[str, Any], *, moments: bool = True) -> None:
        """Copy the engines' tensors, and write them to a folder of this name in another thread; the one before has ended."""
        store = self._store_of_kept()
        snapshots = {
            key: engine.snapshot() if moments else engine.snapshot(moments=False) for key, engine in engines.items()
        }
        shards = files.Shards(self.group.rank, self.group.world_size, snapshots)
        arguments = (store, name, shards, json.dumps(state))
        self._writer = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._writer.start()

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

    def restore(self, engines: Mapping[str, Saved]) -> dict[str, Any] | None:
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
            into = shared_folder(own, self.group)
            folders = files.list_checkpoints(self.store, self.key) if self.group.rank == 0 else []
            for folder in self.group.gather(folders):
                problem, state = load_folder(self.store, folder, engines, into, self.group)
                if not problem:
                    break
                self.log(f"checkpoint {folder.rpartition('/')[2]} is skipped: {problem}")
            else:
                return None
            self.group.barrier()
        self._latest = f"{self.store.uri}/{folder}"
        if self.group.rank == 0:
            self._kept.read(self.store, self.key, state)
        state.pop(KEY, None)
        return state

    def keep(
        self,
        name: str,
        step: int,
        engines: Mapping[str, Saved],
        facts: Mapping[str, Any],
        *,
        moments: bool = True,
    ) -> None:
        """Save engines as the kept state of this name, in place of the one before, which stays if that fails. Every rank calls it.

        Without moments it has only what an export needs. A run without a store keeps it in a temporary folder.
        """
        self.wait()  # before another rank can write to the new folder: the writer of rank 0 deletes what it does not know
        self._save(self._folder_name(name, step), engines, {"step": step, **facts}, moments=moments)

    def kept(self, name: str) -> int | None:
        """The step of the kept state of this name, once it is written; None if there is none. Every rank calls it."""
        folder = self._kept_folder(name)
        return None if folder is None else files.step_of(folder)

    def _kept_folder(self, name: str) -> str | None:
        self.wait()
        return self.group.gather([self._kept.folders.get(name)])[0]

    def load_kept(self, name: str, engines: Mapping[str, Saved]) -> dict[str, Any]:
        """Load a kept state into the engines; return its step and facts. Every rank calls it. Raises InputError if it is damaged."""
        folder, store = self._kept_folder(name), self._store_of_kept()
        if folder is None:
            raise InputError(
                f"{store.uri}/{self.key} has no kept state {name}; delete the folder to start the stage over."
            )
        with tempfile.TemporaryDirectory(prefix="rlhf-kept-") as own:
            into = shared_folder(own, self.group)
            problem, state = load_folder(store, f"{self.key}/{folder}", engines, into, self.group)
            self.group.barrier()
        if problem:
            raise InputError(f"{store.uri}/{self.key}/{folder}: {problem}; delete {self.key} to start the stage over.")
        return state

    @property
    def can_keep(self) -> bool:
        """Whether states can be kept: there is a store, or all ranks are on one machine. Every rank asks."""
        return self.store is not None or len(set(self.group.gather([node_rank()]))) == 1

    def _store_of_kept(self) -> Store:
        """The store, or without one a temporary folder of this machine, the same for all ranks."""
        if self.store is not None:
            return self.store
        if self._temporary is None:
            own = tempfile.mkdtemp(prefix="rlhf-kept-") if self.group.rank == 0 else ""
            self._temporary = FolderStore(Path(self.group.gather([own])[0]))
        return self._temporary

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
        if self._temporary and self.group.rank == 0:
            shutil.rmtree(self._temporary.folder, ignore_errors=True)

    def _write(self, store: Store, name: str, shards: files.Shards, state: str) -> None:
        """Runs in the writer thread."""
        try:
            files.write_checkpoint(store, f"{self.key}/{name}", shards, state)
            if shards.rank == 0:
                if slot_of(name) == "step":
                    self._prune(newest=name)
                self._kept.delete_unused(store, self.key, written=name)
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
            if slot_of(self._outcome) != "step":
                self._kept.folders[slot_of(self._outcome)] = self._outcome
            elif self.store is not None:
                self._latest = f"{self.store.uri}/{self.key}/{self._outcome}"
