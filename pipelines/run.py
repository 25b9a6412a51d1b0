"""Running the compiled pipeline on this machine."""

import contextlib
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
from components.rlhf.edges.tracking import SQLITE, close_parent
from components.rlhf.errors import InputError
from pipelines.compile import compile_pipeline
from pipelines.display import Display
from pipelines.preflight import check_inputs
from pipelines.runner import RunLog, container_processes
from pipelines.settings import dump_yaml
from pipelines.summary import build_summary

MIN_FREE_BYTES = 3 * 2**30  # five models of the default size, and room to work


def run_pipeline(params: Params, run: Path, *, tracking_uri: str, console: Console) -> dict[str, Any]:
    """Compile the pipeline into the run directory, execute it there, and return its summary (also in summary.json).

    Raises InputError before anything is written when an input or the directory cannot be used.
    """
    check_inputs(params)
    claim(run)
    console.print(f"Run directory: {run}", soft_wrap=True)
    run = run.resolve()
    tracking = params.tracking.model_copy(update={"uri": params.tracking.uri or tracking_uri})
    (run / "params.yaml").write_text(dump_yaml(params), encoding="utf-8")
    package = compile_pipeline(params, run / "pipeline.yaml")
    run_id = f"{run.name}-{uuid.uuid4().hex[:8]}"  # folders of one name in two places are two runs
    display = Display(console)
    log = RunLog(folder=run / "logs", environment={"RLHF_RUN_ID": run_id}, on_line=display.on_line)
    error = ""
    try:
        with display, container_processes(log), quiet_kfp():
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
        failed = [stage for stage in log.stages if stage.status == "failed"]
        error = f"{failed[-1].name}: {failed[-1].error}" if failed else str(failure)
    except KeyboardInterrupt:
        error = "interrupted"
    summary = build_summary(
        params, run, log.stages, run_id=run_id, error=error, tracking_uri=tracking.uri if tracking.enabled else ""
    )
    text = json.dumps(summary, indent=2, allow_nan=False)
    (run / "summary.json").write_text(text + "\n", encoding="utf-8")
    close_parent(
        tracking,
        run_id=run_id,
        status="FAILED" if error else "FINISHED",
        metrics=summary["evaluation"],
        files=[run / "params.yaml", run / "summary.json"],
    )
    return summary


def claim(run: Path) -> None:
    """Make the run directory. Raises InputError when it holds another run, cannot be written, or has too little room."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
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


def default_run_folder(params: Params) -> Path:
    return Path("runs") / f"{params.preset}-{time.strftime('%Y%m%d-%H%M%S')}"


def tracking_uri_for(run: Path, *, chosen: bool) -> str:
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
