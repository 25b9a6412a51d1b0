"""The message about the end of a run, and its delivery to a webhook."""

import json
import re
import time
import urllib.error
import urllib.request
from urllib.parse import quote

from components.notify.result import RunResult, warn
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.policy import TITLES
from components.rlhf.text.redaction import redact
from components.rlhf.tracking.answers import warn as warn_of_mlflow
from components.rlhf.tracking.parent import Parent

ATTEMPTS, TIMEOUT_SECONDS = 3, 10.0


def as_message(config: NotifyStageConfig, result: RunResult, *, mlflow_link: str = "") -> dict[str, str]:
    """The JSON object for the webhook; Slack, Teams and Mattermost display `text`.

    Its links are those that stay: Kubeflow Pipelines deletes workflows and pods some time after the end of a run, but keeps the run
    and its archived logs, and MLflow keeps the reports.
    """
    link = f"{config.ui_url.rstrip('/')}/#/runs/details/{quote(result.run_id, safe='')}" if config.ui_url else ""
    text = f"RLHF run {config.preset} ({result.run_id or 'started manually'}) {result.status}"
    if result.failed_stage:
        text += f" in {result.failed_stage}" + (f": {result.error.rstrip('.')}" if result.error else "")
    elif result.decision:
        by = f" ({TITLES[result.method]})" if result.method in TITLES else ""
        text += f": {'promoted' if result.decision == 'promote' else 'rejected'}{by}, {result.reason}"
    return {
        "text": " ".join(filter(None, [f"{as_plain_text(text)}.", link, mlflow_link])),
        "status": result.status,
        "preset": config.preset,
        "run_id": result.run_id,
        "job": result.job,
        "decision": result.decision,
        "reason": result.reason,
        "method": result.method,
        "failed_stage": result.failed_stage,
        "error": result.error,
        "link": link,
        "mlflow_link": mlflow_link,
    }


def as_plain_text(text: str) -> str:
    """Text without what Slack and Mattermost take for a mention or a link, such as <!channel>, which would call everybody."""
    return re.sub(r"<(?=[!@#a-z])", "< ", text)


def post(url: str, message: dict[str, str], parent: Parent | None) -> None:
    """POST the message to the webhook, if there is one. The URL is a secret and appears in no warning.

    The parent run remembers the delivery, so that another attempt of this task does not announce the run again.
    """
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
                _remember(parent, message["status"])
                return
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            problem = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
            time.sleep(attempt)
    warn(f"the message could not be posted to the webhook ({problem})")


def _remember(parent: Parent | None, status: str) -> None:
    try:
        if parent:
            parent.set_notified(status)
    except Exception as error:  # MLflow must not fail a run
        warn_of_mlflow(error)
