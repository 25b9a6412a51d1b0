"""The ranks that train together, from torchrun's environment variables."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from components.rlhf.engine.protocol import Group

T = TypeVar("T")


class SingleProcess:
    """A group of one process. Implements Group."""

    rank = 0
    world_size = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x

    def max_int(self, n: int) -> int:
        return n

    def gather(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def barrier(self) -> None:
        return

    def watchdog(self, step: str | None) -> None:
        return


class ProcessGroup:
    """torch.distributed over NCCL or gloo. Implements Group."""

    def __init__(self, *, timeout_minutes: float) -> None:
        self.timeout_minutes = timeout_minutes
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._watch: threading.Timer | None = None
        self.watchdog("joining the other processes")
        # The watchdog can name the step that hangs; torch's own timeout is the second line of defence.
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=2 * timeout_minutes)
        )

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def max_int(self, n: int) -> int:
        return int(self.max(torch.tensor(n)))

    def gather(self, items: Sequence[T]) -> list[T]:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        dist.barrier()

    def watchdog(self, step: str | None) -> None:
        if self._watch:
            self._watch.cancel()
        if step is None:
            return
        self._watch = threading.Timer(60 * self.timeout_minutes, self._give_up, [step])
        self._watch.daemon = True
        self._watch.start()

    def close(self) -> None:
        if self._watch:
            self._watch.cancel()
        dist.destroy_process_group()

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        total = x.detach().to(self.device, copy=True)
        dist.all_reduce(total, operation)
        return total.to(x.device)

    def _give_up(self, step: str) -> None:
        """End this process from a thread that does not hang; the launcher then ends the other ranks."""
        faulthandler.dump_traceback(all_threads=True)
        print(
            f"error: rank {self.rank} of {self.world_size}: {step} took longer than training.timeout_minutes "
            f"({self.timeout_minutes:g} minutes); another rank hangs or has died. The stack of each thread is above.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def local_rank() -> int:
    """Rank among the processes on this machine (torchrun's LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine (torchrun's LOCAL_WORLD_SIZE); without torchrun's agent, each is taken to be alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def node_rank() -> int:
    """Rank of this machine among those of the group (torchrun's GROUP_RANK)."""
    return int(os.environ.get("GROUP_RANK") or int(os.environ.get("RANK", "0")) // local_world_size())


SINGLE_PROCESS = SingleProcess()


@contextlib.contextmanager
def join_process_group(*, timeout_minutes: float) -> Iterator[Group]:
    """The group of ranks that torchrun started this process in, or SINGLE_PROCESS without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    group = ProcessGroup(timeout_minutes=timeout_minutes)
    yield group
    group.close()  # not after an error: closing waits for the other ranks, which may have died
