"""The frame of every stage program: options, settings, tracking, errors, and KFP's executor output."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import click
from pydantic import ValidationError

from components.rlhf.checkpoints.stop_signal import StopSignal
from components.rlhf.config.budget import without_budget
from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.processes import Processes
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.runtime.accelerators import require_accelerators
from components.rlhf.runtime.elsewhere import errors_as_lines, launch_stage, start_stage_worker
from components.rlhf.runtime.executor import write_executor_output
from components.rlhf.runtime.memory import collect_old_objects_rarely, keep_few_kernels, keep_freed_memory
from components.rlhf.runtime.nodes import STARTED, launch_processes
from components.rlhf.runtime.process import die_with_parent, end_before_finalization
from components.rlhf.runtime.stage_run import RUN_ID, Config, StageRun, rank
from components.rlhf.runtime.termination import message_of, tell_launcher, write_termination_message
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from components.rlhf.text.redaction import redact_output
from components.rlhf.tracking.mlflow import Tracker, start_tracking, with_environment_uri
from components.rlhf.tracking.process import start_tracking_process
from components.rlhf.tracking.runs import MANUAL_RUN_ID
from components.rlhf.trainjob.worker import is_launcher, is_worker

PEER_ERROR_GRACE_SECONDS = 5.0


def stage_program(
    name: str,
    config_class: type[Config],
    *,
    reads: Mapping[str, str],
    writes: Mapping[str, str],
    may_read: Mapping[str, str] = MappingProxyType({}),
    uses_mlflow: bool = False,
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the program of a stage, with one option per path that it reads or writes, each with its help text.

    may_read are inputs that may be missing; the function then gets None. It is called with the StageRun and the paths, by name. The
    docstring of its module is the help of the program. A function that itself uses MLflow is tracked in the same process.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        def command(settings: str, tracking: str, storage: str, executor_input: str, **paths: str | None) -> None:
            succeed = end_before_finalization(function.__module__)
            if is_launcher():
                with errors_as_lines():
                    text = settings_text(settings)
                    launch_stage(
                        name,
                        parse_config(config_class, text),
                        os.environ.get(RUN_ID, MANUAL_RUN_ID),
                        settings=text,
                        tracking=tracking,
                        storage=storage,
                        executor_input=executor_input,
                        paths=paths,
                        writes=writes,
                    )
                succeed()
                return
            worker = start_stage_worker(paths, writes, storage, executor_input) if is_worker() else None
            with stage_run(
                name,
                config_class,
                settings,
                tracking,
                storage,
                worker.executor_input if worker else executor_input,
                uses_mlflow=uses_mlflow,
                deliver=worker.deliver if worker else None,
            ) as run:
                given = worker.paths if worker else {key: Path(path) if path else None for key, path in paths.items()}
                run.program, run.paths = name, {key: path for key, path in given.items() if path is not None}
                run.log_inputs([*reads, *may_read])
                function(run, **given)
            succeed()

        options = [
            click.option(f"--{path.replace('_', '-')}", type=click.Path(), required=path not in may_read, help=text)
            for path, text in {**reads, **may_read, **writes}.items()
        ]
        for option in reversed([*options, *STAGE_OPTIONS]):
            command = option(command)
        return click.command(help=sys.modules[function.__module__].__doc__)(command)

    return decorate


TRACKING_OPTION = click.option(
    "--tracking", default="{}", help="TrackingConfig as JSON; its uri defaults to MLFLOW_TRACKING_URI."
)
STORAGE_OPTION = click.option(
    "--storage",
    default="{}",
    help="StorageConfig as JSON: location of checkpoints and published models, and access to S3.",
)
STAGE_OPTIONS = (
    click.option("--settings", required=True, help="Settings of the stage: JSON, or the path of a JSON file."),
    TRACKING_OPTION,
    STORAGE_OPTION,
    click.option("--executor-input", default="", help="KFP's executor input as JSON; omit it when running manually."),
)


@contextlib.contextmanager
def stage_run(
    name: str,
    config_class: type[Config],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
    executor_input: str = "",
    *,
    uses_mlflow: bool = False,
    deliver: Callable[[], None] | None = None,
) -> Iterator[StageRun[Config]]:
    """Run the body of a stage. An InputError is printed as one line, with exit code 1; other errors keep their traceback.

    deliver copies the complete outputs elsewhere, before checkpoints are deleted; rank 0 calls it.
    """
    started = time.monotonic()
    run: StageRun[Config] | None = None
    redact_output()
    tracker: Tracker | None = None
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries make logs unreadable
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin on a busy core stall torch
    keep_freed_memory()
    keep_few_kernels()
    collect_old_objects_rarely()
    die_with_parent()
    stop = StopSignal()
    stop.install()
    try:
        text = settings_text(settings)
        config = parse_config(config_class, text)
        require_accelerators()
        require_writable_tmpdir()
        processes: Processes = getattr(config, "processes", Processes())
        launch_processes(name, processes)
        tracking_config = with_environment_uri(parse_config(TrackingConfig, tracking))
        storage_config = parse_config(StorageConfig, storage)
        if rank() > 0:
            tracking_config = tracking_config.model_copy(update={"enabled": False})
        run_id = os.environ.get(RUN_ID, MANUAL_RUN_ID)
        # Two tasks of one stage in a run keep their MLflow runs, checkpoints and published models apart.
        name = getattr(config, "stage_name", name)
        start = start_tracking if uses_mlflow else start_tracking_process
        tracker = start(tracking_config, run_id=run_id, stage=name, params=config.model_dump(mode="json"))
        progress = Progress(name, silent=rank() > 0)
        run = StageRun(
            name, config, without_budget(text), progress, tracker, tracking_config, run_id, storage_config, executor_input, stop,
            processes, float(os.environ.get(STARTED, started)),
        )  # fmt: skip
        yield run
        if executor_input and rank() == 0:
            write_executor_output(executor_input, run.outputs)
        if deliver and rank() == 0:
            deliver()
        for call in run.on_success:
            try:
                call()
            except (InputError, OSError) as error:  # the outputs are there: no reason to fail, and to train again
                print(f"warning: {error}", file=sys.stderr, flush=True)
        tracker.finish("FINISHED")
    except InputError as error:
        if tracker:
            tracker.finish("FAILED", str(error))
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # If all ranks fail, the first one of each node prints the error, and the launcher ends the rest.
            time.sleep(PEER_ERROR_GRACE_SECONDS)
        tell_launcher(error)
        write_termination_message(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BaseException as error:
        is_failure = isinstance(error, Exception)  # not a signal or the end of the launcher of several processes
        if tracker:
            tracker.finish("FAILED", message_of(error) if is_failure else "")
        if "WORLD_SIZE" in os.environ and isinstance(error, RuntimeError):
            time.sleep(PEER_ERROR_GRACE_SECONDS)  # may be caused by a lost peer, whose own error is to be printed first
        if is_failure:
            tell_launcher(error)
            write_termination_message(error)
        raise
    finally:
        for call in run.on_end if run else ():
            with contextlib.suppress(Exception):  # what it would have released expires
                call()


def require_writable_tmpdir() -> None:
    """Raise InputError if temporary files cannot be written where TMPDIR says; Python would silently write them elsewhere."""
    folder = os.environ.get("TMPDIR")
    if folder and not os.access(folder, os.W_OK):
        raise InputError(
            f"TMPDIR is {folder}, which user {os.getuid()} cannot write; correct it, or, for the scratch of a profile, use a storage class "
            "to whose volumes all users can write."
        )


def parse_config(config_class: type[Config], text: str) -> Config:
    """Parse settings. Raises InputError."""
    try:
        return config_class.from_json(text)
    except ValidationError as error:
        raise InputError(f"Settings: {explain_validation_error(error, config_class)}") from None


def settings_text(settings: str) -> str:
    """The JSON text of --settings, which is the text or the path of a file. Raises InputError."""
    return settings if settings.lstrip().startswith("{") else _read(settings)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--settings {path} is neither JSON nor a readable file ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"--settings {path} is not UTF-8; save it as UTF-8.") from None
