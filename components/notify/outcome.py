"""How a run ended, who is told, and what is tidied up. Nothing here fails a run: what cannot be done is a warning."""

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
from components.rlhf.tracking.mlflow import connect

# The state of the run as kfp.local and as the cluster's metadata store say it.
STATUS_OF_STATE = {
    "SUCCEEDED": "succeeded",
    "COMPLETE": "succeeded",
    "CACHED": "succeeded",
    "FAILED": "failed",
    "CANCELED": "canceled",
    "CANCELLED": "canceled",
}
MLFLOW = {"succeeded": "FINISHED", "failed": "FAILED", "canceled": "KILLED"}
ATTEMPTS, SECONDS = 3, 10.0


@dataclass(frozen=True)
class Outcome:
    """The end of one run. decision is promote or reject, or empty where nothing was registered."""

    status: str  # succeeded, failed or canceled
    run_id: str
    job: str = ""
    decision: str = ""
    reason: str = ""

    @property
    def mlflow_status(self) -> str:
        return MLFLOW[self.status]


def determine_outcome(status: str, tracking: TrackingConfig, run_id: str) -> Outcome:
    """The ending from KFP's PipelineTaskFinalStatus and from what the run registered.

    A run whose pods were taken away may be left without a final state; it succeeded only if its last stage, registration, was done.
    """
    try:
        said = json.loads(status)
        state, job = str(said.get("state", "")), str(said.get("pipelineJobResourceName", ""))
    except (ValueError, AttributeError):
        warn(f"the final status {status!r} cannot be read")
        state, job = "", ""
    decision, reason = find_decision(tracking, run_id)
    unknown = "succeeded" if decision else "failed"
    return Outcome(STATUS_OF_STATE.get(state.upper(), unknown), run_id, job, decision, reason)


def find_decision(tracking: TrackingConfig, run_id: str) -> tuple[str, str]:
    """Decision and reason of the version that this run registered; empty without one."""
    if not tracking.enabled or not tracking.uri or not run_id:
        return "", ""
    try:
        for version in connect(tracking.uri).search_model_versions(f"name = '{tracking.registered_model}'"):
            if version.tags.get("rlhf.run_id") == run_id:
                return version.tags.get("decision", ""), version.tags.get("reason", "")
    except Exception as error:  # whatever MLflow raises: the run has ended all the same
        warn(
            f"the model registry could not be asked ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )
    return "", ""


def message(config: NotifyStageConfig, outcome: Outcome) -> dict[str, str]:
    """What the webhook is sent; `text` is what Slack, Teams and Mattermost show."""
    link = f"{config.ui_url.rstrip('/')}/#/runs/details/{outcome.run_id}" if config.ui_url else ""
    text = f"RLHF run {config.preset} ({outcome.run_id or 'by hand'}) {outcome.status}"
    if outcome.decision:
        text += f": {'promoted' if outcome.decision == 'promote' else 'rejected'}, {outcome.reason}"
    return {
        "text": f"{text}. {link}".rstrip() if link else f"{text}.",
        "status": outcome.status,
        "preset": config.preset,
        "run_id": outcome.run_id,
        "job": outcome.job,
        "decision": outcome.decision,
        "reason": outcome.reason,
        "link": link,
    }


def send(url: str, content: dict[str, str]) -> None:
    """POST the content as JSON; an empty URL is nobody to tell. The URL is a secret and appears in no message."""
    if not url:
        return
    if not url.startswith(("https://", "http://")):
        warn("RLHF_WEBHOOK_URL is no http(s) address; correct WEBHOOK_URL in the Secret")
        return
    data = redact(json.dumps(content)).encode()
    for attempt in range(ATTEMPTS):
        try:
            request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=SECONDS):
                return
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            problem = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
            time.sleep(attempt)
    warn(f"the webhook did not take the message ({problem})")


def clean_up(storage: StorageConfig, outcome: Outcome) -> None:
    """Delete the checkpoints of a run that succeeded: stages delete their own, but an attempt that died under other settings cannot."""
    if outcome.status != "succeeded" or not storage.checkpoint_uri or not outcome.run_id:
        return
    try:
        open_store(storage.checkpoint_uri, storage).delete(outcome.run_id)
    except (InputError, OSError) as error:
        warn(f"the checkpoints of this run could not be deleted ({error})")


def warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr, flush=True)
