"""The message about the end of a run, and its delivery to a webhook."""

from urllib.parse import quote

from components.notify.result import RunResult, warn
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.policy import TITLES
from components.rlhf.runtime.webhook import as_plain_text, post_message
from components.rlhf.tracking.answers import warn as warn_of_mlflow
from components.rlhf.tracking.parent import Parent


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


def post(url: str, message: dict[str, str], parent: Parent | None) -> None:
    """POST the message to the webhook, if there is one.

    The parent run remembers the delivery, so that another attempt of this task does not announce the run again.
    """
    if not url:
        return
    problem = post_message(url, message)
    if problem:
        warn(problem)
    else:
        _remember(parent, message["status"])


def _remember(parent: Parent | None, status: str) -> None:
    try:
        if parent:
            parent.set_notified(status)
    except Exception as error:  # MLflow must not fail a run
        warn_of_mlflow(error)
