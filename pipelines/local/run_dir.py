"""A run directory, read while the run goes on and afterwards."""

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from components.rlhf.artifacts.manifest import MANIFEST, read_manifest
from components.rlhf.text.errors import InputError
from pipelines.run_state import RunState, TaskState, task_label

PARAMS_FILE, IDENTITY_FILE, LOCK_FILE, APPROVAL_FILE = "params.yaml", "run.json", ".lock", "approval.json"
FOLLOW_SECONDS = 0.5


def find_run(run: Path | None) -> Path:
    """The given run directory, or the newest one below runs/. Raises InputError if there is none."""
    if run is None:
        found = sorted(Path("runs").glob(f"*/{IDENTITY_FILE}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise InputError(
                "There is no run below runs/; pass the directory of a run, or start one with kfp-rlhf run."
            )
        return found[-1].parent
    if not (run / IDENTITY_FILE).is_file():
        raise InputError(f"{run} contains no run (no {IDENTITY_FILE}); pass the directory of a run.")
    return run


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run directory; {} if it is not there. Raises InputError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); resume the run, or start a new one.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; resume the run, or start a new one.")
    return content


def read_params(run: Path) -> dict[str, Any]:
    """The parameters of a run, as its params.yaml has them. Raises InputError if they cannot be read."""
    try:
        content = yaml.safe_load((run / PARAMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{run / PARAMS_FILE} cannot be read ({reason}); start a new run.") from None
    return content if isinstance(content, dict) else {}


def read_state(run: Path) -> RunState:
    """The state of a run and of its tasks. Raises InputError for files that cannot be read."""
    running, summary = is_running(run), _latest_summary(run)
    tasks = list(_tasks(run, running=running, of_summary=summary.get("stages", {}), ended=bool(summary)))
    if running:
        return RunState(run=str(run), state="running", tasks=tasks)
    state, reason = summary.get("status", "stopped"), str(summary.get("reason", ""))
    if reason == "interrupted":
        state, reason = "stopped", ""
    return RunState(run=str(run), state=state, tasks=tasks, reason=reason)


def _latest_summary(run: Path) -> dict[str, Any]:
    """The summary of the latest attempt; {} if that is running or was killed, whatever earlier attempts have left."""
    path = run / "summary.json"
    begun = [file.stat().st_mtime for file in (run / "finished").glob("*.begun")]
    if path.is_file() and path.stat().st_mtime < max(begun, default=0.0):
        return {}
    return read_json(path)


def artifacts(run: Path) -> Iterator[tuple[Path, str]]:
    """Folder and kind of each complete artifact of a run, in the order of their names. Copies of a manifest alone are left out."""
    for path in sorted((run / "artifacts").glob(f"*/*/*/{MANIFEST}")):
        manifest = read_manifest(path.parent)
        if all((path.parent / name).is_file() for name in manifest.files):
            yield path.parent, manifest.kind


def artifacts_of(run: Path, kind: str) -> list[Path]:
    """Folders of the complete artifacts of a kind."""
    return [path for path, found in artifacts(run) if found == kind]


def is_running(run: Path) -> bool:
    """Whether a process holds the lock of a run directory."""
    try:
        with (run / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _tasks(
    run: Path, *, running: bool, ended: bool, of_summary: Mapping[str, Mapping[str, Any]]
) -> Iterator[TaskState]:
    """The tasks that have begun, in the order of their start, and those that wait, in the order of the pipeline."""
    started = sorted((run / "finished").glob("*.begun"), key=lambda path: path.stat().st_mtime)
    names = [path.stem for path in started]
    for path in started:
        record = read_json(path.with_suffix(".json")).get("record", {})
        line = last_progress(run / "logs" / f"{path.stem}.log")
        if record:
            yield TaskState(name=path.stem, state=record["status"], seconds=record["seconds"], line=line)
            continue
        begun = float(read_json(path).get("at", 0.0))
        last = _last_write(run / "logs" / f"{path.stem}.log", begun)
        state = "running" if running else "failed" if line.startswith("error: ") else "stopped"
        yield TaskState(
            name=path.stem,
            state=state,
            seconds=max(0.0, (time.time() if running else last) - begun),
            line=line.removeprefix("error: "),
        )
    rest = [name for name in planned_tasks(run / "pipeline.yaml") if name not in names]
    if any(name.startswith("register") for name in names):
        rest = [name for name in rest if name != "register"]
    for name in rest:
        if not running and name in of_summary:  # notify, which has no outputs to keep
            yield TaskState(name=name, state=of_summary[name]["status"], seconds=of_summary[name]["seconds"])
            continue
        yield TaskState(name=name, state="skipped" if ended and not running else "waiting")


def planned_tasks(pipeline: Path) -> list[str]:
    """Names of the tasks of a compiled pipeline, each after those that it depends on; [] if it is not there yet."""
    try:
        specification = next(yaml.load_all(pipeline.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
        tasks = specification["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    except (OSError, StopIteration, KeyError, TypeError, yaml.YAMLError):
        return []
    ordered: list[str] = []
    while free := [n for n in tasks if n not in ordered and set(tasks[n].get("dependentTasks", ())) <= set(ordered)]:
        ordered += sorted(free, key=list(tasks).index)
    # The gate registers the policy.
    return ["register" if name == "gate" else task_label(name) for name in ordered] + ["notify"]


def last_progress(log: Path) -> str:
    """The last line of a stage's log that is progress or an error, without the name of the stage; "" if there is none."""
    for line in reversed(tail(log).splitlines()):
        if line.startswith("error: "):
            return line
        if line.startswith("[") and "] " in line:
            return line.partition("] ")[2]
    return ""


def tail(path: Path, num_bytes: int = 16_384) -> str:
    """The end of a file, from a line on; "" if it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - num_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text if size <= num_bytes else text.partition("\n")[2]


def _last_write(log: Path, otherwise: float) -> float:
    try:
        return log.stat().st_mtime
    except OSError:
        return otherwise


def log_of(run: Path, task: str | None) -> Path:
    """The log of a task of a run, by default of the one that started last. Raises InputError if there is none."""
    logs = sorted((run / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise InputError(f"{run} has no logs yet; its first task has not started.")
    if task is None:
        return logs[-1]
    for log in logs:
        if log.stem == task:
            return log
    raise InputError(
        f"{run} has no log of the task {task}; its tasks with logs: {', '.join(log.stem for log in logs)}."
    )


def tail_lines(log: Path, num_lines: int | None) -> str:
    """The last lines of a log, or all of it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return "".join(lines[-num_lines:] if num_lines else lines)


def follow_log(run: Path, log: Path) -> Iterator[str]:
    """What is appended to a log, until its task or the run ends."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while True:
            ended = not is_running(run) or (run / "finished" / f"{log.stem}.json").is_file()
            yield from file
            if ended:
                return
            time.sleep(FOLLOW_SECONDS)
