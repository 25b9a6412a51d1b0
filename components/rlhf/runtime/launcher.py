"""Launch of a stage in several processes, on one node or on one of several, by torchrun's elastic agent."""

import os
import signal
import sys
import uuid
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from components.rlhf.runtime.job import Job, join
from components.rlhf.runtime.nodes import Nodes, choose_interface
from components.rlhf.runtime.process import DIE_WITH_PARENT
from components.rlhf.runtime.termination import FINAL_PREFIX, write_termination_message


def launch(num_processes: int) -> int:
    """Run the current command in num_processes processes; return the exit code of the first that failed, or 0.

    Each has torchrun's environment variables (RANK, WORLD_SIZE, MASTER_ADDR...). If one fails, the agent terminates the
    others; all are killed if this process dies.
    """
    local = dict(min_nodes=1, max_nodes=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=uuid.uuid4().hex)
    failed = _run_agent(num_processes, **local)
    if failed is None:
        return 0
    first_rank, first = failed.get_first_failure()
    if first.exitcode < 0:  # killed by a signal, without an error message
        _report(f"rank {first_rank} of {num_processes} {_killed_by(first.exitcode)}.")
        return 1
    return int(first.exitcode)


def launch_on_node(nodes: Nodes, num_local: int, *, timeout_minutes: float) -> int:
    """Wait for the other nodes, run num_local processes on this one, and return the exit code of the first that failed, or 0.

    If another node fails or is lost, the processes of this one end too, and the error names that node. Raises RetryableError if a
    node does not join within the time.
    """
    job = join(nodes, timeout_minutes=timeout_minutes, log=lambda text: print(text, file=sys.stderr, flush=True))
    choose_interface(nodes)
    endpoint = f"[{nodes.address}]:{nodes.port}" if ":" in nodes.address else f"{nodes.address}:{nodes.port}"
    static: dict[str, Any] = dict(
        min_nodes=nodes.number,
        max_nodes=nodes.number,
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": nodes.rank, "timeout": int(60 * timeout_minutes) + 1},
        run_id=job.run_id,
    )
    with job.watching():
        failed = _run_agent(num_local, **static)
        if failed is None:
            job.succeed()
            job.linger()
            return 0
        return _report_failure(failed, job, num_local)


def _report_failure(failed: ChildFailedError, job: Job, num_local: int) -> int:
    """Tell the other nodes, and print what this failure is due to if its process has not."""
    first_rank, first = failed.get_first_failure()
    own = f"rank {first_rank} of {num_local * job.nodes.number}"
    if job.lost:
        _report(job.lost, replace=True)
    elif first.exitcode < 0:
        _report(f"{own} {_killed_by(first.exitcode)}.", job)
    elif first.message.startswith(FINAL_PREFIX):  # an InputError, which the process has printed
        job.fail(first.message)
    elif first.exitcode > 128:  # all processes have ended on a signal
        job.fail(f"{own} ended with code {first.exitcode}.")
    elif cause := job.cause():  # such as a connection that another node has closed
        _report(cause, job, replace=True)
    else:
        has_message = first.error_file_data.get("message") == first.message
        job.fail(f"{own}: {first.message}" if has_message else f"{own} ended with code {first.exitcode}; see its log.")
    job.linger()
    return 1 if first.exitcode < 0 else int(first.exitcode)


def _run_agent(num_processes: int, **rendezvous: Any) -> ChildFailedError | None:
    # By default each process would start one thread per core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ[DIE_WITH_PARENT] = str(os.getpid())
    config = LaunchConfig(nproc_per_node=num_processes, max_restarts=0, monitor_interval=0.1, **rendezvous)
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as failed:
        return failed
    return None


def _killed_by(exit_code: int) -> str:
    name = signal.Signals(-exit_code).name
    return f"was killed by {name}{'; the machine may have run out of memory' if name == 'SIGKILL' else ''}"


def _report(message: str, job: Job | None = None, *, replace: bool = False) -> None:
    if job:
        job.fail(message)
    write_termination_message(message, replace=replace)
    print(f"error: {message.removeprefix(FINAL_PREFIX)}", file=sys.stderr, flush=True)
