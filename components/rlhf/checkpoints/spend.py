"""What a run has spent: one small file for each attempt of a training stage, in the run's folder, and a limit that was set later.

run-5f0c7e1a/spend/ppo-1b9d04c7.json    {"stage": "ppo", "price_per_hour": 40.0, "seconds": 1234.5}, rewritten while the attempt runs
                   budget.json          {"budget": 800}: replaces the limit in the settings of every stage of the run

Stages delete their checkpoints when they succeed, but not these files: they count for the stages after them.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, TypeAdapter

from components.rlhf.checkpoints.run import has_marker, run_prefix
from components.rlhf.config.base import NonNegative
from components.rlhf.storage.store import Store
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json

FOLDER, BUDGET = "spend", "budget.json"
WRITE_SECONDS = 30.0  # an attempt that is killed has spent up to this much more than its file says
LIMIT = 10_000  # bytes of a file
AMOUNT = TypeAdapter(Annotated[NonNegative, Field(strict=True)])


class Ledger:
    """The file of one attempt of a stage, written by a thread until close(), and the sum over all attempts of all stages of the run."""

    def __init__(
        self, store: Store, run_id: str, stage: str, *, budget: float, price_per_hour: float, started: float
    ) -> None:
        """price_per_hour is that of all pods of the stage together; started is when the attempt started (time.monotonic)."""
        self.store, self.run_id, self.stage = store, run_id, stage
        self.price_per_hour, self.started, self.budget = price_per_hour, started, budget
        self.folder = f"{run_prefix(run_id)}/{FOLDER}"
        self._file = f"{self.folder}/{stage}-{uuid.uuid4().hex[:8]}.json"
        self._others: dict[str, float] = {}  # by stage, without this attempt
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="spend", daemon=True)

    def open(self) -> None:
        """Write and read for the first time. Raises InputError if the store cannot be used, or a file is invalid."""
        try:
            self._exchange()
        except OSError as error:
            raise InputError(
                f"{self.store.uri}/{self._file} cannot be written ({error.strerror}); free some space, or correct storage.checkpoint_uri."
            ) from None
        self._thread.start()

    def close(self) -> None:
        """Write for the last time. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError, InputError):
            self._write()

    def spent(self) -> dict[str, float]:
        """By stage, that of this attempt last."""
        own = self._others.get(self.stage, 0.0) + self.price_per_hour * (time.monotonic() - self.started) / 3600
        return {stage: amount for stage, amount in self._others.items() if stage != self.stage} | {self.stage: own}

    def is_exhausted(self) -> bool:
        return sum(self.spent().values()) >= self.budget

    def message(self, kept: str) -> str:
        """Why the stage ends. kept says which checkpoint is kept."""
        spent = self.spent()
        parts = ", ".join(f"{stage} {amount:.2f}" for stage, amount in spent.items())
        budget = f"{self.budget:.2f}".removesuffix(".00")
        return (
            f"cluster.budget is {budget}, and this run has spent {sum(spent.values()):.2f} ({parts}); {kept}. To go on, "
            "resume with: kfp-rlhf run --resume DIR --set cluster.budget=AMOUNT. On a cluster, raise it with: kfp-rlhf budget "
            f"{self.store.uri}/{run_prefix(self.run_id)} AMOUNT, and retry the run."
        )

    def _keep_writing(self) -> None:
        while not self._stop.wait(WRITE_SECONDS):
            with contextlib.suppress(Exception):  # the store is unreachable for a while; saves report it
                self._exchange()

    def _exchange(self) -> None:
        self._write()
        self._others, self.budget = read_spend(self.store, self.folder, self.budget, skip=self._file)

    def _write(self) -> None:
        seconds = time.monotonic() - self.started
        entry = {"stage": self.stage, "price_per_hour": self.price_per_hour, "seconds": seconds}
        self.store.write(self._file, json.dumps(entry).encode())


def read_spend(store: Store, folder: str, budget: float, *, skip: str = "") -> tuple[dict[str, float], float]:
    """What all attempts have spent, by stage, and the budget: that of budget.json, or the given one. Raises InputError."""
    spent: dict[str, float] = {}
    for key in store.list(folder):
        if key == skip:
            continue
        entry = _read(store, key)
        try:
            if key == f"{folder}/{BUDGET}":
                budget = AMOUNT.validate_python(entry["budget"])
                continue
            seconds, price = (AMOUNT.validate_python(entry[name]) for name in ("seconds", "price_per_hour"))
            spent[str(entry["stage"])] = spent.get(str(entry["stage"]), 0.0) + seconds * price / 3600
        except (KeyError, ValueError):
            raise InputError(
                f"{store.uri}/{key} is not a file of what the run has spent; correct or delete it."
            ) from None
    return spent, budget


def set_budget(store: Store, run_folder: str, budget: float) -> float:
    """Replace the budget of a run, whose folder in the store is given; return what it has spent. Raises InputError."""
    if not has_marker(store, run_folder):
        raise InputError(f"{store.uri}/{run_folder} is not the folder of a run's checkpoints; give STORE/run-ID.")
    spent, _ = read_spend(store, f"{run_folder}/{FOLDER}", budget)
    store.write(f"{run_folder}/{FOLDER}/{BUDGET}", json.dumps({"budget": budget}).encode())
    return sum(spent.values())


def _read(store: Store, key: str) -> Mapping[str, object]:
    try:
        content = parse_json(store.read(key, limit=LIMIT) or b"{}")
    except NotJsonError:
        content = {}
    return content if isinstance(content, dict) else {}
