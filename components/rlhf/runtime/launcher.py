"""Launch of a stage in several local processes by torchrun's elastic agent."""

import os
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from components.rlhf.runtime.process import DIE_WITH_PARENT
from components.rlhf.runtime.termination import write_termination_message


def launch(num_processes: int) -> int:
    """Run the current command in num_processes processes; return the exit code of the first that failed, or 0.

    Each has torchrun's environment variables (RANK, WORLD_SIZE, MASTER_ADDR...). If one fails, the agent terminates the
    others; all are killed if this process dies.
    """
    # By default each process would start one thread per core.
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
        if first.exitcode < 0:  # killed by a signal, without an error message
            name = signal.Signals(-first.exitcode).name
            hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
            message = f"rank {first_rank} of {num_processes} was killed by {name}{hint}."
            write_termination_message(message)
            print(f"error: {message}", file=sys.stderr, flush=True)
            return 1
        return first.exitcode
    return 0
