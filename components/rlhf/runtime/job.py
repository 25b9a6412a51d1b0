"""How the launchers of several nodes find each other, and learn that another node has failed or is gone.

The launcher of node rank 0 keeps a store (torch's TCPStore) at the master address, which torchrun's agents and the ranks use as well:

joined/RANK   how many launchers of this node rank have joined     host/RANK   host name of the node
outcome       {"run": id} once all have joined, or {"error": why}  beat/RANK   counts up while the launcher lives
failed/RANK   message of its first failure                         done/RANK   its processes have succeeded
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from components.rlhf.runtime.nodes import Nodes
from components.rlhf.runtime.termination import FINAL_PREFIX
from components.rlhf.text.errors import InputError, RetryableError

POLL_SECONDS, LOG_SECONDS = 0.5, 15.0
BEAT_SECONDS = 2.0
SILENT_SECONDS = 60.0  # without a beat, a node is lost, although its processes have not noticed
GONE_SECONDS = 8.0  # the same, once the processes of this node have failed
GRACE_SECONDS = 15.0  # for the processes of this node to notice, and to report the loss of another one themselves
REQUEST = timedelta(seconds=20)  # time limit of one request to the store
StoreError = (DistError, RuntimeError, OSError)


class Job:
    """This launcher's membership in a job whose nodes have all joined."""

    def __init__(self, nodes: Nodes, store: TCPStore, run_id: str) -> None:
        self.nodes, self.run_id, self._store = nodes, run_id, store
        self._hosts = {rank: store.get(f"host/{rank}").decode() for rank in range(nodes.number)}
        self._beats: dict[int, tuple[bytes, float]] = {}  # of the other nodes: the last one, and when it arrived
        self._num_beats = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.lost = ""  # the message about another node for which the processes of this one were killed

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, send beats, and kill the processes of this node if another node fails or is silent."""
        thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def succeed(self) -> None:
        with contextlib.suppress(*StoreError):
            self._store.set(f"done/{self.nodes.rank}", "1")

    def fail(self, message: str) -> None:
        """Tell the other nodes why this one fails."""
        with contextlib.suppress(*StoreError):
            self._store.set(f"failed/{self.nodes.rank}", message)

    def cause(self) -> str:
        """After a failure of this node: what another one has reported, or that it is gone; "" if neither is found in time."""
        deadline = time.monotonic() + GONE_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < deadline:
            if message := self._problem(GONE_SECONDS):
                return message
            time.sleep(POLL_SECONDS)
        return ""

    def linger(self) -> None:
        """On node rank 0, keep the store until the other nodes have ended too, for at most GONE_SECONDS."""
        deadline = time.monotonic() + GONE_SECONDS
        with contextlib.suppress(*StoreError):
            while self.nodes.rank == 0 and time.monotonic() < deadline and not all(map(self._has_ended, self._hosts)):
                time.sleep(POLL_SECONDS / 5)

    def _has_ended(self, rank: int) -> bool:
        return rank == 0 or self._store.check([f"done/{rank}"]) or self._store.check([f"failed/{rank}"])

    def _watch(self) -> None:
        since: float | None = None
        while not self._stop.wait(BEAT_SECONDS):
            message = self._problem(SILENT_SECONDS)
            since = (since or time.monotonic()) if message else None
            if since and time.monotonic() - since > GRACE_SECONDS:
                self.lost = message
                _kill_children()
                return

    def _problem(self, silent_seconds: float) -> str:
        """Send a beat; the message about the first other node that has failed or has been silent for so long."""
        with self._lock:
            try:
                self._num_beats += 1
                self._store.set(f"beat/{self.nodes.rank}", str(self._num_beats))
                return next(filter(None, (self._problem_of(other, silent_seconds) for other in self._hosts)), "")
            except StoreError:
                return (
                    f"node rank 0 ({self._hosts[0]}) is gone: {self.nodes.address}:{self.nodes.port} does not answer."
                )

    def _problem_of(self, other: int, silent_seconds: float) -> str:
        name = f"node rank {other} ({self._hosts[other]})"
        if other == self.nodes.rank or self._store.check([f"done/{other}"]):
            return ""
        if self._store.check([f"failed/{other}"]):
            text = self._store.get(f"failed/{other}").decode()
            final = FINAL_PREFIX if text.startswith(FINAL_PREFIX) else ""
            return f"{final}{name} failed: {text.removeprefix(FINAL_PREFIX)}"
        beat = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
        last, since = self._beats.get(other, (None, 0.0))
        if beat != last:
            self._beats[other] = (beat, time.monotonic())
        elif time.monotonic() - since > silent_seconds:
            return f"{name} is gone: it has sent no sign of life for {time.monotonic() - since:.0f} seconds."
        return ""


def join(nodes: Nodes, *, timeout_minutes: float, log: Callable[[str], None]) -> Job:
    """Wait until every node has joined. Raises RetryableError if one does not within the time, or this one comes too late."""
    deadline = time.monotonic() + 60 * timeout_minutes
    store = _open_store(nodes, deadline, timeout_minutes, log)
    if nodes.rank == 0:
        store.set("number", str(nodes.number))
        store.set("host/0", socket.gethostname())
        return Job(nodes, store, _wait_for_nodes(nodes, store, deadline, timeout_minutes, log))
    try:
        number = int(store.get("number"))
        if number != nodes.number:
            raise InputError(
                f"PET_NNODES is {nodes.number} on node rank {nodes.rank}, and {number} on node rank 0; give all nodes the same."
            )
        if store.add(f"joined/{nodes.rank}", 1) > 1:
            raise RetryableError(_late_message(nodes, store))
        store.set(f"host/{nodes.rank}", socket.gethostname())
        outcome = _wait_for_outcome(nodes, store, deadline)
        store.add("told", 1)
        if "error" in outcome:
            raise RetryableError(outcome["error"])
        return Job(nodes, store, outcome["run"])
    except StoreError:
        raise RetryableError(
            f"node rank {nodes.rank} lost node rank 0 ({nodes.address}:{nodes.port}) before all nodes had joined; look at its log."
        ) from None


def _open_store(nodes: Nodes, deadline: float, timeout_minutes: float, log: Callable[[str], None]) -> TCPStore:
    """Create the store on node rank 0, or connect to it. The name of node rank 0 may not resolve yet."""
    logged, reason = time.monotonic(), ""
    while True:
        try:
            socket.getaddrinfo(nodes.address, nodes.port)
            if nodes.rank > 0:  # torch's own attempts print a warning each
                socket.create_connection((nodes.address, nodes.port), timeout=REQUEST.total_seconds()).close()
            is_master = nodes.rank == 0
            return TCPStore(
                nodes.address,
                nodes.port,
                is_master=is_master,
                wait_for_workers=False,
                timeout=REQUEST,
                multi_tenant=True,
            )
        except socket.gaierror:
            reason = "the name does not resolve"
        except ConnectionRefusedError:
            reason = "it is not listening"
        except StoreError as error:
            reason = " ".join(str(error).split())[:200]
            if nodes.rank == 0:
                raise RetryableError(
                    f"node rank 0 cannot listen at {nodes.address}:{nodes.port} ({reason}); PET_MASTER_ADDR must be an address of node "
                    "rank 0, and PET_MASTER_PORT a free port."
                ) from None
        if time.monotonic() > deadline:
            raise RetryableError(
                f"node rank {nodes.rank} of {nodes.number} found no node rank 0 at {nodes.address}:{nodes.port} within {timeout_minutes:g} "
                f"minutes ({reason}): it has not started, has already ended, or the network between the nodes is blocked."
            )
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            log(f"waiting for node rank 0 at {nodes.address}:{nodes.port} ({reason})")
        time.sleep(POLL_SECONDS)


def _wait_for_nodes(
    nodes: Nodes, store: TCPStore, deadline: float, timeout_minutes: float, log: Callable[[str], None]
) -> str:
    """On node rank 0: wait for all others; return the id of this run of the job."""
    logged = float("-inf")
    while missing := [rank for rank in range(1, nodes.number) if not store.check([f"host/{rank}"])]:
        names = f"node rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        if time.monotonic() > deadline:
            error = f"{names} of {nodes.number} did not join within training.timeout_minutes ({timeout_minutes:g}); look at the pod."
            store.set("outcome", json.dumps({"error": error}))
            _wait_until_told(store, nodes.number - 1 - len(missing))
            raise RetryableError(error)
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            log(f"waiting for {len(missing)} of {nodes.number} nodes ({names})")
        time.sleep(POLL_SECONDS)
    run_id = uuid.uuid4().hex
    store.set("outcome", json.dumps({"run": run_id}))
    return run_id


def _wait_until_told(store: TCPStore, number: int) -> None:
    """Keep the store until so many nodes have read the outcome, or have had the time to."""
    deadline = time.monotonic() + 10 * POLL_SECONDS
    while store.add("told", 0) < number and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 5)


def _wait_for_outcome(nodes: Nodes, store: TCPStore, deadline: float) -> dict[str, Any]:
    while not store.check(["outcome"]):
        if time.monotonic() > deadline + REQUEST.total_seconds():
            return {
                "error": f"node rank {nodes.rank} joined, but node rank 0 never said that all {nodes.number} nodes have."
            }
        time.sleep(POLL_SECONDS)
    outcome: dict[str, Any] = json.loads(store.get("outcome"))
    return outcome


def _late_message(nodes: Nodes, store: TCPStore) -> str:
    host = store.get(f"host/{nodes.rank}").decode()
    return (
        f"node rank {nodes.rank} of {nodes.number} came too late: a node of this rank ({host}) has already joined this run of the job; "
        "a node cannot join again until all nodes have been restarted."
    )


def _kill_children() -> None:
    """Kill the processes that this one has started; they would wait for the lost node until their time-out."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it may end at any time
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                os.kill(int(stat.parent.name), signal.SIGKILL)
