"""A sweep on this machine: an ordinary run directory for each point, one run after the other, which share their equal stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from components.rlhf.text.errors import InputError
from components.rlhf.tracking.registry import make_champion
from pipelines.local.journal import write_json_atomic
from pipelines.local.run import check_run, default_tracking_uri, resume_pipeline, run_lock, run_pipeline
from pipelines.local.run_dir import IDENTITY_FILE, PARAMS_FILE, read_json, read_state
from pipelines.local.sweep_results import SWEEP_FILE, read_entries
from pipelines.settings import dump_yaml, load_params
from pipelines.sweep import Point


def create_sweep(points: Sequence[Point], folder: Path) -> None:
    """Write the parameters of all points. Raises InputError before that if the folder or an input of a point cannot be used."""
    if (folder / SWEEP_FILE).is_file():
        raise InputError(f"{folder} already contains a sweep; go on with --resume, or choose another --out.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists and is not an empty folder; choose another --out.")
    for point in points:
        try:
            check_run(point.params, folder / point.name)
        except InputError as error:
            raise InputError(f"point {point.name}: {error}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for point in points:
            (folder / point.name).mkdir()
            (folder / point.name / PARAMS_FILE).write_text(dump_yaml(point.params), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from None
    entries = [{"name": point.name, "settings": dict(point.settings)} for point in points]
    write_json_atomic(folder / SWEEP_FILE, {"directory": str(folder.resolve()), "points": entries})


def run_sweep(folder: Path, console: Console) -> dict[str, str]:
    """Run the points that have not succeeded; return the errors of those that could not start or failed, by their names.

    A point that fails does not end the sweep, and an interruption does. Raises InputError if the folder has no sweep, was moved, or is
    used by another process.
    """
    names = list(read_entries(folder))
    directory = read_json(folder / SWEEP_FILE).get("directory")
    if directory != str(folder.resolve()):
        raise InputError(f"{folder} was moved from {directory}, where its MLflow database is; move it back to go on.")
    errors: dict[str, str] = {}
    with run_lock(folder):
        for number, name in enumerate(names, start=1):
            if _has_succeeded(folder / name):
                continue
            console.print(f"Point {number} of {len(names)}: {name}", style="bold", markup=False, soft_wrap=True)
            try:
                summary = _run_point(folder, name, names, console)
            except InputError as error:
                summary = {"status": "failed", "reason": str(error)}
            if summary["status"] != "succeeded":
                errors[name] = str(summary["reason"])
                console.print(f"error: {name}: {errors[name]}", style="red", markup=False, soft_wrap=True)
            if summary["reason"] == "interrupted":
                break
    return errors


def _run_point(folder: Path, name: str, names: Sequence[str], console: Console) -> dict[str, Any]:
    run, donors = folder / name, [folder / other for other in names if other != name]
    if (run / IDENTITY_FILE).is_file():
        return resume_pipeline(run, console=console, donors=donors)
    tracking_uri = default_tracking_uri(run, in_run_dir=False)  # one database for all points
    return run_pipeline(load_params(run / PARAMS_FILE), run, tracking_uri=tracking_uri, console=console, donors=donors)


def _has_succeeded(run: Path) -> bool:
    return (run / IDENTITY_FILE).is_file() and read_state(run).state == "succeeded"


def crown(run: Path) -> str:
    """Move the alias champion in MLflow to the version of a point; return that version, or "" if there is none."""
    identity = read_json(run / IDENTITY_FILE)
    tracking = load_params(run / PARAMS_FILE).tracking.model_copy(update={"uri": identity.get("tracking_uri") or None})
    return make_champion(tracking, str(identity["run_id"]))
