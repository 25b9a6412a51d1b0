"""Starting a stage in several processes of this machine, with torchrun's own agent."""

import os
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from components.rlhf.runtime.process import DIE_WITH_PARENT


def launch(num_processes: int) -> int:
    """Run this very command in num_processes processes; return the exit code of the first that failed, or 0.

    Each has torchrun's variables (RANK, WORLD_SIZE, MASTER_ADDR...). When one fails the agent ends the others, and none of
    them outlives this process. A container that is started with those variables already set is never launched again.
    """
    # Without a limit each process would start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ[DIE_WITH_PARENT] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    command = sys.orig_argv[1:]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as failed:
        first_rank, first = failed.get_first_failure()
        if first.exitcode < 0:  # it could not say anything itself
            name = signal.Signals(-first.exitcode).name
            hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
            print(
                f"error: rank {first_rank} of {num_processes} was ended by {name}{hint}.", file=sys.stderr, flush=True
            )
            return 1
        return first.exitcode
    return 0
