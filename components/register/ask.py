"""Asks a person whether a policy that the gate would promote becomes champion: where, with which message, and what follows."""

import os
from collections.abc import Callable
from pathlib import Path

from components.register.approval import Channel, RegisteredVersion, approval_file, wait_for_approval, warn_of
from components.register.describe import PENDING, Outcome
from components.rlhf.config.register import ApprovalConfig, RegisterStageConfig
from components.rlhf.runtime.stage_run import StageRun
from components.rlhf.runtime.webhook import URL_VARIABLE, as_plain_text, post_message
from components.rlhf.text.errors import InputError
from components.rlhf.tracking.parent import open_parent


def ask_person(
    run: StageRun[RegisterStageConfig],
    config: ApprovalConfig,
    gate: Outcome,
    register: Callable[[Outcome], str],
    *,
    digest: str,
    evaluation: Path,
) -> Outcome:
    """Wait for the answer; return what becomes of the policy.

    gate is the outcome without a person, and digest that of the policy. Raises InputError if there is no place for an answer.
    """
    report = evaluation.with_name("report")  # beside the evaluation, in a run on this machine
    facts = {"verdict": gate.reason} | ({"report": str(report)} if report.is_file() else {})
    file = approval_file(digest, facts)
    channels: list[Channel] = [file] if file else []
    if run.tracking.enabled and run.tracking.uri:
        waiting = Outcome(PENDING, f"{gate.reason}; waits for approval")
        channels.append(RegisteredVersion(run.tracking, run.run_id, digest, lambda: register(waiting)))
    if not channels:
        raise InputError(
            "gate.approval is required, but there is no MLflow where a person could approve; set tracking.enabled and tracking.uri, or "
            "MLFLOW_TRACKING_URI."
        )

    def tell(text: str, is_request: bool) -> None:
        run.progress.log(text)
        if is_request:
            links = [
                link for link in (facts.get("report", ""), _report_link(run), run_link(config, run.run_id)) if link
            ]
            message = (
                f"RLHF run {config.preset} ({run.run_id}) {text}. Verdict: {gate.reason}. {' '.join(links)}".rstrip()
            )
            _post({"text": as_plain_text(message), "status": "waiting", "preset": config.preset, "run_id": run.run_id})

    answer = wait_for_approval(channels, config.hours, tell)
    run.progress.log(str(answer))
    decision = "promote" if answer.approved else "reject"
    if file:
        file.finish(answer)
    return Outcome(decision, f"{gate.reason}; {answer}", answer.tags())


def run_link(config: ApprovalConfig, run_id: str) -> str:
    return f"{config.ui_url.rstrip('/')}/#/runs/details/{run_id}" if config.ui_url else ""


def _report_link(run: StageRun[RegisterStageConfig]) -> str:
    parent = open_parent(run.tracking, run.run_id)
    return parent.report_link() if parent else ""


def _post(message: dict[str, str]) -> None:
    url = os.environ.get(URL_VARIABLE, "")
    problem = post_message(url, message) if url else ""
    if problem:
        warn_of(problem)
