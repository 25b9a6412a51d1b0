"""`kfp-rlhf approve`: a person's answer to a run that waits for approval, on this machine or in MLflow."""

import json
import time
from pathlib import Path

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.tracking.approvals import Answer, answer_in, approve_version, require_pending, timestamp
from pipelines.local.journal import write_json_atomic
from pipelines.local.run_dir import APPROVAL_FILE, find_run, is_running, read_json


def make_answer(*, approved: bool, by: str, why: str) -> Answer:
    """Raises InputError for an empty name or reason."""
    for option, text in (("--by", by), ("--why", why)):
        if not text.strip() or not text.isprintable():
            raise InputError(f"{option} must be a text on one line.")
    return Answer(approved=approved, by=by.strip(), why=why.strip(), at=timestamp(time.time()))


def approve_directory(run: Path | None, answer: Answer) -> str:
    """Write the answer into a run directory, and return what was written. Raises InputError if the run does not wait for one."""
    folder = find_run(run)
    path = folder / APPROVAL_FILE
    content = read_json(path)
    if not content:
        raise InputError(
            f"{folder} does not wait for approval; kfp-rlhf status {folder} shows how far it is, and gate.approval must be required."
        )
    require_pending(content, str(folder))
    write_json_atomic(path, content | answer.tags())
    rest = "" if is_running(folder) else f"; the run does not run: kfp-rlhf run --resume {folder} goes on with it"
    return f"{path} says: {answer}{rest}"


def approve_run_id(run_id: str, answer: Answer, *, uri: str, model: str) -> str:
    """Set the answer as tags of the version that a run has registered in MLflow, and return what was set."""
    tracking = TrackingConfig(uri=uri, registered_model=model)
    return f"version {approve_version(tracking, run_id, answer)} of {model} is {answer}"


def answer_of(run: Path) -> Answer | None:
    """The answer in a run directory, or None."""
    try:
        content = json.loads((run / APPROVAL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return answer_in(content, time.time())[0] if isinstance(content, dict) else None
