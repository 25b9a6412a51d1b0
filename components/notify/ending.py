"""How a run ended, who is told, and what is tidied up. Nothing here fails a run: what cannot be done is a warning."""

import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from components.rlhf.config.cluster import NotifyStage
from components.rlhf.config.storage import StorageSettings, TrackingSettings
from components.rlhf.edges.secrets import redact
from components.rlhf.edges.storage import open_store
from components.rlhf.edges.tracking import connect
from components.rlhf.errors import InputError

# The state of the run as kfp.local and as the cluster's metadata store say it.
ENDINGS = {
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
class Ending:
    """The end of one run. decision is promote or reject, or empty where nothing was registered."""

    status: str  # succeeded, failed or canceled
    run_id: str
    job: str = ""
    decision: str = ""
    reason: str = ""

    @property
    def mlflow_status(self) -> str:
        return MLFLOW[self.status]


def ending_of(status: str, tracking: TrackingSettings, run_id: str) -> Ending:
    """The ending from KFP's PipelineTaskFinalStatus and from what the run registered.

    A run whose pods were taken away may be left without a final state; it succeeded only if its last stage, registration, was done.
    """
    try:
        said = json.loads(status)
        state, job = str(said.get("state", "")), str(said.get("pipelineJobResourceName", ""))
    except (ValueError, AttributeError):
        warn(f"the final status {status!r} cannot be read")
        state, job = "", ""
    decision, reason = registered(tracking, run_id)
    unknown = "succeeded" if decision else "failed"
    return Ending(ENDINGS.get(state.upper(), unknown), run_id, job, decision, reason)


def registered(tracking: TrackingSettings, run_id: str) -> tuple[str, str]:
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


def message(stage: NotifyStage, ending: Ending) -> dict[str, str]:
    """What the webhook is sent; `text` is what Slack, Teams and Mattermost show."""
    link = f"{stage.ui_url.rstrip('/')}/#/runs/details/{ending.run_id}" if stage.ui_url else ""
    text = f"RLHF run {stage.preset} ({ending.run_id or 'by hand'}) {ending.status}"
    if ending.decision:
        text += f": {'promoted' if ending.decision == 'promote' else 'rejected'}, {ending.reason}"
    return {
        "text": f"{text}. {link}".rstrip() if link else f"{text}.",
        "status": ending.status,
        "preset": stage.preset,
        "run_id": ending.run_id,
        "job": ending.job,
        "decision": ending.decision,
        "reason": ending.reason,
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


def clean_up(storage: StorageSettings, ending: Ending) -> None:
    """Delete the checkpoints of a run that succeeded: stages delete their own, but an attempt that died under other settings cannot."""
    if ending.status != "succeeded" or not storage.checkpoint_uri or not ending.run_id:
        return
    try:
        open_store(storage.checkpoint_uri, storage).delete(ending.run_id)
    except (InputError, OSError) as error:
        warn(f"the checkpoints of this run could not be deleted ({error})")


def warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr, flush=True)
