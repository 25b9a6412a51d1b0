"""A stage program whose work runs in the pods of a TrainJob: in the task that launches it, and in those pods."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.processes import Processes
from components.rlhf.runtime.process import die_with_parent
from components.rlhf.runtime.termination import write_termination_message
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from components.rlhf.text.redaction import redact_output
from components.rlhf.trainjob.worker import Worker, start_worker


def launch_stage(
    stage: str,
    config: BaseConfig,
    run_id: str,
    *,
    settings: str,
    tracking: str,
    storage: str,
    executor_input: str,
    paths: Mapping[str, str | None],
    writes: Mapping[str, str],
) -> None:
    """Run a stage as a TrainJob, and take over its outputs. Raises InputError."""
    from components.rlhf.trainjob.launch import Cancelled, Task, launch  # imports kubernetes

    name = str(getattr(config, "stage_name", stage))  # a second task of a stage has a job of its own
    processes: Processes = getattr(config, "processes", Processes())
    given = {key: Path(value) for key, value in paths.items() if value is not None}
    task = Task(
        stage=name,
        module=f"components.{stage}",
        run_id=run_id,
        num_processes=processes.number,
        settings=settings,
        tracking=tracking,
        storage=storage,
        executor_input=executor_input,
        reads={key: path for key, path in given.items() if key not in writes},
        writes={key: path for key, path in given.items() if key in writes},
    )
    try:
        launch(task, Progress(name).log)
    except Cancelled as cancelled:
        sys.exit(cancelled.exit_code)


def start_stage_worker(
    paths: Mapping[str, str | None], writes: Mapping[str, str], storage: str, executor_input: str
) -> Worker:
    """Copy the inputs of a stage to this node. Exits with a message if that fails."""
    with errors_as_lines():
        die_with_parent()
        return start_worker(paths, writes, storage, executor_input)


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print an InputError of the block as one line, and exit with code 1; other errors keep their traceback."""
    redact_output()
    try:
        yield
    except InputError as error:
        write_termination_message(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception as error:
        write_termination_message(error)
        raise
