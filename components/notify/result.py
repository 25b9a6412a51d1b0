"""The result of a run and how it is reported. Errors here are warnings and never fail a run."""

import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.mlflow import RUN_ID_TAG, connect

# The states of a run in kfp.local and in the cluster's metadata store.
STATUS_OF_STATE = {
    "SUCCEEDED": "succeeded",
    "COMPLETE": "succeeded",
    "CACHED": "succeeded",
    "FAILED": "failed",
    "CANCELED": "canceled",
    "CANCELLED": "canceled",
}
MLFLOW_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "canceled": "KILLED"}
ATTEMPTS, TIMEOUT_SECONDS = 3, 10.0


@dataclass(frozen=True)
class RunResult:
    """The result of one run. decision is promote or reject, or empty if no model was registered."""

    status: str  # succeeded, failed or canceled
    run_id: str
    job: str = ""
    decision: str = ""
    reason: str = ""

    @property
    def mlflow_status(self) -> str:
        return MLFLOW_STATUS[self.status]


def get_result(status: str, tracking: TrackingConfig, run_id: str) -> RunResult:
    """The result according to KFP's PipelineTaskFinalStatus and the model registry.

    A run whose pods were deleted may have no final state; it succeeded only if register, its last stage, has finished.
    """
    try:
        final_status = json.loads(status)
        state, job = str(final_status.get("state", "")), str(final_status.get("pipelineJobResourceName", ""))
    except (ValueError, AttributeError):
        warn(f"the final status {status!r} cannot be parsed")
        state, job = "", ""
    decision, reason = find_decision(tracking, run_id)
    default = "succeeded" if decision else "failed"
    return RunResult(STATUS_OF_STATE.get(state.upper(), default), run_id, job, decision, reason)


def find_decision(tracking: TrackingConfig, run_id: str) -> tuple[str, str]:
    """Decision and reason of the model version that this run has registered; empty if there is none."""
    if not tracking.enabled or not tracking.uri or not run_id:
        return "", ""
    try:
        for version in connect(tracking.uri).search_model_versions(f"name = '{tracking.registered_model}'"):
            if version.tags.get(RUN_ID_TAG) == run_id:
                return version.tags.get("decision", ""), version.tags.get("reason", "")
    except Exception as error:  # MLflow must not fail a run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warn(f"the model registry could not be queried ({reason})")
    return "", ""


def as_message(config: NotifyStageConfig, result: RunResult) -> dict[str, str]:
    """The JSON object for the webhook; Slack, Teams and Mattermost display `text`."""
    link = f"{config.ui_url.rstrip('/')}/#/runs/details/{result.run_id}" if config.ui_url else ""
    text = f"RLHF run {config.preset} ({result.run_id or 'started manually'}) {result.status}"
    if result.decision:
        text += f": {'promoted' if result.decision == 'promote' else 'rejected'}, {result.reason}"
    return {
        "text": f"{text}. {link}".rstrip(),
        "status": result.status,
        "preset": config.preset,
        "run_id": result.run_id,
        "job": result.job,
        "decision": result.decision,
        "reason": result.reason,
        "link": link,
    }


def post(url: str, message: dict[str, str]) -> None:
    """POST the message to the webhook, if there is one. The URL is a secret and appears in no warning."""
    if not url:
        return
    if not url.startswith(("https://", "http://")):
        warn("RLHF_WEBHOOK_URL is not an http(s) URL; correct WEBHOOK_URL in the Secret")
        return
    data = redact(json.dumps(message)).encode()
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
                return
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            problem = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
            time.sleep(attempt)
    warn(f"the message could not be posted to the webhook ({problem})")


def delete_checkpoints(storage: StorageConfig, result: RunResult) -> None:
    """Delete what is stored under the id of a successful run; stages delete their own checkpoints, which have other keys."""
    if result.status != "succeeded" or not storage.checkpoint_uri or not result.run_id:
        return
    try:
        open_store(storage.checkpoint_uri, storage).delete(result.run_id)
    except (InputError, OSError) as error:
        warn(f"the checkpoints of this run could not be deleted ({error})")


def warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr, flush=True)
