"""Running the compiled pipeline on this machine."""

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp.components
import kfp.local
from rich.console import Console

from components.rlhf.config.params import Params
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.mlflow import SQLITE, finish_parent_run
from pipelines.compile import compile_pipeline
from pipelines.local.display import Display
from pipelines.local.journal import Journal, write_json_atomic
from pipelines.local.runner import LocalRun, container_processes
from pipelines.local.summary import build_summary
from pipelines.preflight import check_inputs, check_stores
from pipelines.settings import dump_yaml, load_params

PARAMS, IDENTITY, LOCK = "params.yaml", "run.json", ".lock"
STARTUP_FILES = {PARAMS, LOCK, f".{IDENTITY}.writing"}  # what a start that died at once leaves
MIN_FREE_BYTES = 3 * 2**30  # five models of the default size, and room to work


def run_pipeline(params: Params, run: Path, *, tracking_uri: str, console: Console) -> dict[str, Any]:
    """Run the pipeline of params in a new run directory; return its summary (also in summary.json).

    Raises InputError before anything is written when an input or the directory cannot be used.
    """
    check_inputs(params)
    check_stores(params)
    create_run_dir(run)
    with run_lock(run), disk_space_errors(run):
        tracking = params.tracking.model_copy(update={"uri": params.tracking.uri or tracking_uri})
        (run / PARAMS).write_text(dump_yaml(params), encoding="utf-8")
        # Folders of one name in two places are two runs. Written last: a directory without it has begun nothing.
        identity = {"run_id": f"{run.name}-{uuid.uuid4().hex[:8]}", "tracking_uri": tracking.uri}
        write_json_atomic(run / IDENTITY, identity)
        return _execute(params, run.resolve(), tracking, identity["run_id"] or "", console)


def resume_pipeline(run: Path, *, console: Console) -> dict[str, Any]:
    """Go on with the run of a directory: stages that finished are verified and kept, the rest runs; return its summary.

    Raises InputError when the directory holds no run that has begun, or another process works in it.
    """
    if not (run / IDENTITY).is_file():
        raise InputError(
            f"{run} holds no run that has begun (no {IDENTITY}); start one with --out, or correct the path."
        )
    with run_lock(run), disk_space_errors(run):
        params = load_params(run / PARAMS, ())
        try:
            identity = json.loads((run / IDENTITY).read_text(encoding="utf-8"))
            run_id, uri = str(identity["run_id"]), identity["tracking_uri"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{run / IDENTITY} cannot be read; start a new run.") from None
        tracking = params.tracking.model_copy(update={"uri": uri})
        return _execute(params, run.resolve(), tracking, run_id, console)


def _execute(params: Params, run: Path, tracking: TrackingConfig, run_id: str, console: Console) -> dict[str, Any]:
    """Compile the pipeline into the run directory, execute what has not finished there, and write the summary."""
    console.print(f"Run directory: {run}", soft_wrap=True)
    # Here a failure is shown at once: whoever looks at it decides.
    once = params.model_copy(update={"cluster": params.cluster.model_copy(update={"num_retries": 0})})
    package = compile_pipeline(once, run / "pipeline.yaml")
    display = Display(console)
    local_run = LocalRun(
        folder=run / "logs",
        environment={"RLHF_RUN_ID": run_id},
        on_line=display.on_line,
        journal=Journal(run / "finished"),
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
            checkpoints = params.storage.checkpoint_uri or str(run / "checkpoints")
            storage = params.storage.model_copy(update={"checkpoint_uri": checkpoints})
            pipeline(tracking=tracking.canonical_json(), storage=storage.canonical_json())
    except RuntimeError as failure:  # what kfp.local raises for a failed task; the stage has said why
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
    finish_parent_run(
        tracking,
        run_id=run_id,
        status="FAILED" if error else "FINISHED",
        metrics=summary["evaluation"],
        files=[run / PARAMS, run / "summary.json"],
    )
    return summary


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run directory; the kernel lets go when this process ends, however it ends. Raises InputError when another holds it."""
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"Another process works in {run}; wait for it, or choose another --out.") from None
        yield


@contextlib.contextmanager
def disk_space_errors(run: Path) -> Iterator[None]:
    """Raise InputError when the disk fills up."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{run}: no space left on the disk; free some and resume with: kfp-rlhf run --resume {run}"
        ) from error


def create_run_dir(run: Path) -> None:
    """Make the run directory. Raises InputError when it holds another run, cannot be written, or has too little room."""
    if (run / IDENTITY).is_file():
        raise InputError(f"{run} already exists and holds a run; go on with it by --resume, or choose another --out.")
    if run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - STARTUP_FILES):
        raise InputError(f"{run} already exists and is not an empty folder; choose another --out.")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run} cannot be made ({error.strerror}); choose another --out.") from None
    if not os.access(run, os.W_OK):
        raise InputError(f"{run} is not writable; choose another --out.")
    free = shutil.disk_usage(run).free
    if free < MIN_FREE_BYTES:
        run.rmdir()
        raise InputError(
            f"{run.parent} has {free / 2**30:.1f} GiB free and a run needs {MIN_FREE_BYTES / 2**30:.0f}; choose another --out."
        )


def default_run_dir(params: Params) -> Path:
    return Path("runs") / f"{params.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def default_tracking_uri(run: Path, *, chosen: bool) -> str:
    """A sqlite file: in the run directory that somebody chose, or beside all runs, so that they can be compared."""
    folder = run.resolve() if chosen else run.resolve().parent
    return f"{SQLITE}{folder / 'mlflow.db'}"


@contextlib.contextmanager
def quiet_kfp() -> Iterator[None]:
    """kfp.local narrates on the root logger and on stdout, and warns of what only a cluster heeds; the display says enough."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
