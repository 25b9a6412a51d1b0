"""The result of a run, and what is done with it. Errors here are warnings and never fail a run."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from components.rlhf.checkpoints.run import delete_run
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.config.trainjob import NAMESPACE_VARIABLE
from components.rlhf.storage.store import open_store
from components.rlhf.text.errors import InputError
from components.rlhf.tracking.answers import warn as warn_of_mlflow
from components.rlhf.tracking.parent import Parent, StageResult
from components.rlhf.tracking.registry import find_version
from components.rlhf.tracking.runs import connect

OUTAGE_SECONDS = 60.0
# The states of a run in kfp.local and in the cluster's metadata store.
STATUS_OF_STATE = {
    "SUCCEEDED": "succeeded",
    "COMPLETE": "succeeded",
    "CACHED": "succeeded",
    "FAILED": "failed",
    "CANCELED": "canceled",
    "CANCELLED": "canceled",
}


@dataclass(frozen=True)
class RunResult:
    """The result of one run. decision is promote or reject, or empty if no model was registered, of which method is ppo or dpo."""

    status: str  # succeeded, failed or canceled
    run_id: str
    job: str = ""
    decision: str = ""
    reason: str = ""
    method: str = ""
    failed_stage: str = ""
    error: str = ""  # of the failed stage
    stages: Sequence[StageResult] = ()


def get_result(status: str, tracking: TrackingConfig, run_id: str, parent: Parent | None) -> RunResult:
    """The result according to KFP's PipelineTaskFinalStatus, the model registry and the nested runs.

    A run whose pods were deleted may have no final state; it succeeded only if register, its last stage, has finished.
    """
    try:
        final_status = json.loads(status)
        state, job = str(final_status.get("state", "")), str(final_status.get("pipelineJobResourceName", ""))
    except (ValueError, AttributeError):
        warn(f"the final status {status!r} cannot be parsed")
        state, job = "", ""
    decision, reason, method = find_decision(tracking, run_id)
    result = STATUS_OF_STATE.get(state.upper(), "succeeded" if decision else "failed")
    stages = _stages(parent)
    failed = next((stage for stage in reversed(stages) if stage.status == "FAILED"), None)
    if failed is None or result == "succeeded":
        return RunResult(result, run_id, job, decision, reason, method, stages=stages)
    return RunResult(result, run_id, job, decision, reason, method, failed.name, failed.error, stages)


def _stages(parent: Parent | None) -> list[StageResult]:
    try:
        return parent.stages() if parent else []
    except Exception as error:  # MLflow must not fail a run
        warn_of_mlflow(error)
        return []


def find_decision(tracking: TrackingConfig, run_id: str) -> tuple[str, str, str]:
    """Decision, reason and method of the model version that this run has registered; empty if there is none."""
    if not tracking.enabled or not tracking.uri or not run_id:
        return "", "", ""
    try:
        version = find_version(connect(tracking.uri), tracking.registered_model, run_id)
        if version is not None:
            decision, reason, method = (version.tags.get(name, "") for name in ("decision", "reason", "method"))
            return decision, reason, method
    except Exception as error:  # MLflow must not fail a run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warn(f"the model registry could not be queried ({reason})")
    return "", "", ""


def finish_tracking(parent: Parent | None, result: RunResult, *, params: str) -> bool:
    """Write the result into the parent run and end it; return whether it was announced before."""
    if parent is None:
        return False
    facts = {"run_id": result.run_id, "decision": result.decision, "reason": result.reason or result.error}
    facts |= {"method": result.method} if result.method else {}
    try:
        parent.finish(status=result.status, stages=result.stages, facts=facts, params=params)
        return parent.was_notified(result.status)
    except Exception as error:  # MLflow must not fail a run
        warn_of_mlflow(error)
        return False


def delete_checkpoints(storage: StorageConfig, result: RunResult) -> None:
    """Delete what is left of the checkpoints of a successful run in S3; its stages have deleted their own.

    Volumes are not mounted here: the stages are the only ones that can delete from them.
    """
    uri = storage.checkpoint_uri or ""
    if result.status != "succeeded" or not uri.startswith("s3://") or not result.run_id:
        return
    try:
        delete_run(open_store(uri, storage), result.run_id)
    except (InputError, OSError) as error:
        warn(f"the checkpoints of this run could not be deleted ({error})")


def delete_trainjobs(result: RunResult) -> None:
    """On a cluster whose stages are TrainJobs, delete those that still run, as after a cancelled run, and all of a successful run."""
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if not namespace or not result.run_id:
        return
    from components.rlhf.trainjob.api import connect  # imports kubernetes
    from components.rlhf.trainjob.jobs import delete_jobs_of_run

    try:
        api = connect(namespace, warn)
        api.outage_seconds = OUTAGE_SECONDS
        for name in delete_jobs_of_run(api, result.run_id, with_finished=result.status == "succeeded"):
            print(f"[notify] deleted TrainJob {name}", flush=True)
    except InputError as error:
        warn(f"TrainJobs of this run could not be deleted ({error})")


def warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr, flush=True)
