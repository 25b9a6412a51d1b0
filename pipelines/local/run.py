"""Runs the compiled pipeline on this machine."""

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import shlex
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kfp.components
import kfp.local
from rich.console import Console

from components.rlhf.config.explain import explain_validation_error
from components.rlhf.config.params import Params
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.parent import open_parent
from components.rlhf.tracking.texts import database_uri
from pipelines.compile import compile_pipeline, require_literal_values
from pipelines.local.journal import Journal, write_json_atomic
from pipelines.local.live import Display
from pipelines.local.location import moved
from pipelines.local.run_dir import APPROVAL_FILE, IDENTITY_FILE, LOCK_FILE, PARAMS_FILE, planned_tasks
from pipelines.local.runner import LocalRun, StageRecord, container_processes
from pipelines.local.summary import build_summary
from pipelines.plan import refuse_what_cannot_fit, this_machine
from pipelines.preflight import check_inputs, check_stores
from pipelines.settings import dump_yaml, load_params

RESUME_KEYS = {"cluster.budget"}  # parameters that change no result
STARTUP_FILES = {PARAMS_FILE, LOCK_FILE, f".{IDENTITY_FILE}.writing"}  # left by a run that was killed while starting
MIN_FREE_BYTES = 3 * 2**30  # five models of the default size, and working space


def check_run(params: Params, run: Path) -> str:
    """Raise InputError if an input cannot be used, or this machine is too small; return a note on what could not be planned, or ""."""
    require_literal_values(params)
    local_storage(params, run)
    check_inputs(params)
    check_stores(params)
    return refuse_what_cannot_fit(params, this_machine(params.model.precision)) or ""


def run_pipeline(
    params: Params, run: Path, *, tracking_uri: str, console: Console, donors: Sequence[Path] = ()
) -> dict[str, Any]:
    """Run the pipeline in a new run directory; return its summary (also in summary.json).

    Finished stages of donors, which are other run directories, are shared where they have the same settings, inputs and code.
    Raises InputError before anything is written if an input or the directory cannot be used.
    """
    note = check_run(params, run)
    if note:
        console.print(note, soft_wrap=True, markup=False)
    create_run_dir(run)
    with run_lock(run), disk_space_errors(run):
        tracking = params.tracking.model_copy(update={"uri": params.tracking.uri or tracking_uri})
        (run / PARAMS_FILE).write_text(dump_yaml(params), encoding="utf-8")
        # The suffix distinguishes directories of the same name. Written last: a directory without it has no run.
        run_id = f"{run.name}-{uuid.uuid4().hex[:8]}"
        identity = {"run_id": run_id, "tracking_uri": tracking.uri, "directory": str(run.resolve())}
        write_json_atomic(run / IDENTITY_FILE, identity)
        return _execute(params, run.resolve(), tracking, run_id, console, donors)


def resume_pipeline(
    run: Path, *, console: Console, overrides: Sequence[str] = (), donors: Sequence[Path] = ()
) -> dict[str, Any]:
    """Resume the run of a directory: verify and reuse finished stages, and run the others; return its summary.

    overrides change parameters that change no result; they are written into the directory. Raises InputError for others, if the
    directory contains no run, or another process uses it.
    """
    keys = {override.partition("=")[0].strip() for override in overrides}
    if keys - RESUME_KEYS:
        raise InputError(
            f"--resume uses the parameters in the run directory; of these, only {', '.join(RESUME_KEYS)} may change: remove --set "
            f"{min(keys - RESUME_KEYS)} from the command."
        )
    if not (run / IDENTITY_FILE).is_file():
        raise InputError(f"{run} contains no run (no {IDENTITY_FILE}); start one with --out, or correct the path.")
    with run_lock(run), disk_space_errors(run):
        params = load_params(run / PARAMS_FILE, overrides)
        run_id, uri = _read_identity(run)
        if overrides:
            temporary = run / f".{PARAMS_FILE}.writing"
            temporary.write_text(dump_yaml(params), encoding="utf-8")
            temporary.replace(run / PARAMS_FILE)
        tracking = params.tracking.model_copy(update={"uri": uri})
        return _execute(params, run.resolve(), tracking, run_id, console, donors)


def _read_identity(run: Path) -> tuple[str, str | None]:
    """The id and the tracking URI of a run; if its directory was moved, a database in it is where it is now. Raises InputError."""
    try:
        identity = json.loads((run / IDENTITY_FILE).read_text(encoding="utf-8"))
        run_id, uri, old = str(identity["run_id"]), identity["tracking_uri"], identity.get("directory")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{run / IDENTITY_FILE} cannot be read; start a new run.") from None
    directory = str(run.resolve())
    if isinstance(old, str) and old != directory:
        uri = moved(uri, Path(old), Path(directory))
        write_json_atomic(run / IDENTITY_FILE, {"run_id": run_id, "tracking_uri": uri, "directory": directory})
    return run_id, uri


def _execute(
    params: Params, run: Path, tracking: TrackingConfig, run_id: str, console: Console, donors: Sequence[Path]
) -> dict[str, Any]:
    """Compile the pipeline into the run directory, run the stages that have not finished, and write the summary."""
    console.print(f"Run directory: {run}", soft_wrap=True)
    # A local run reports a failure immediately, without retries, keeps its checkpoints in a folder, and starts all processes itself.
    cluster = params.cluster.model_copy(update={"num_retries": 0, "checkpoint_volume": None, "launcher": "local"})
    package = compile_pipeline(params.model_copy(update={"cluster": cluster}), run / "pipeline.yaml")
    stages: list[StageRecord] = []
    display = Display(console, stages, planned_tasks(package))
    local_run = LocalRun(
        folder=run / "logs",
        environment={"RLHF_RUN_ID": run_id, "RLHF_APPROVAL_FILE": str(run / APPROVAL_FILE)},
        on_line=display.show_line,
        journal=Journal(run, [donor.resolve() for donor in donors]),
        stages=stages,
    )
    error = ""
    try:
        with display, container_processes(local_run), quiet_kfp():
            kfp.local.init(
                runner=kfp.local.SubprocessRunner(use_venv=False),
                pipeline_root=str(run / "artifacts"),
                raise_on_error=True,
            )
            pipeline = kfp.components.load_component_from_file(str(package))
            storage = local_storage(params, run)
            pipeline(tracking=tracking.canonical_json(), storage=storage.canonical_json())
    except RuntimeError as failure:  # raised by kfp.local for a failed task, whose record has the reason
        failed = [stage for stage in local_run.stages if stage.status == "failed"]
        error = f"{failed[-1].name}: {failed[-1].error}" if failed else str(failure)
    except KeyboardInterrupt:
        error = "interrupted"
    summary = build_summary(
        params,
        run,
        local_run.stages,
        run_id=run_id,
        error=redact(error),
        tracking_uri=tracking.uri if tracking.enabled else "",
    )
    write_json_atomic(run / "summary.json", summary)
    if error == "interrupted":  # notify, which ends the parent run in MLflow, has not run
        parent = open_parent(tracking, run_id)
        if parent:
            parent.cancel()
    return summary


def local_storage(params: Params, run: Path) -> StorageConfig:
    """The storage settings of a run on this machine: by default, checkpoints are in the run directory. Raises InputError."""
    checkpoints = params.storage.checkpoint_uri or str(run / "checkpoints")
    try:
        return StorageConfig.model_validate({**params.storage.model_dump(), "checkpoint_uri": checkpoints})
    except ValueError as error:  # pydantic's
        reason = explain_validation_error(error, StorageConfig).removeprefix("the parameters: ")
        raise InputError(f"storage: {reason}") from None


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Lock the run directory; the kernel unlocks it when this process ends. Raises InputError if another process has locked it."""
    with (run / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"Another process uses {run}; wait for it, or choose another --out.") from None
        yield


@contextlib.contextmanager
def disk_space_errors(run: Path) -> Iterator[None]:
    """Raise InputError if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{run}: no space left on the disk; free some and resume with: kfp-rlhf run --resume {shlex.quote(str(run))}"
        ) from error


def create_run_dir(run: Path) -> None:
    """Create the run directory. Raises InputError if it contains files, is not writable, or has too little space."""
    if (run / IDENTITY_FILE).is_file():
        raise InputError(f"{run} already contains a run; resume it with --resume, or choose another --out.")
    if run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - STARTUP_FILES):
        raise InputError(f"{run} already exists and is not an empty folder; choose another --out.")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run} cannot be created ({error.strerror}); choose another --out.") from None
    if not os.access(run, os.W_OK):
        raise InputError(f"{run} is not writable; choose another --out.")
    free = shutil.disk_usage(run).free
    if free < MIN_FREE_BYTES:
        run.rmdir()
        raise InputError(
            f"{run.parent} has {free / 2**30:.1f} GiB free, and a run needs {MIN_FREE_BYTES / 2**30:.0f} GiB; choose another --out."
        )


def default_run_dir(params: Params) -> Path:
    return Path("runs") / f"{params.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def default_tracking_uri(run: Path, *, in_run_dir: bool) -> str:
    """A SQLite file in the run directory, or next to it, where all runs can be compared."""
    folder = run.resolve() if in_run_dir else run.resolve().parent
    return database_uri(folder / "mlflow.db")


@contextlib.contextmanager
def quiet_kfp() -> Iterator[None]:
    """Suppress the log, output and warnings of kfp.local; the display shows the progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
