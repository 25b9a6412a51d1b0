"""Creating a TrainJob, or taking over the one that an earlier attempt has created, and deleting it."""

import threading
import time
from collections.abc import Callable

from components.rlhf.text.errors import InputError, RetryableError
from components.rlhf.trainjob.api import GROUP, Api, ApiError, Object, explain
from components.rlhf.trainjob.manifest import RUN_LABEL, digest_of, is_label, run_and_stage_of
from components.rlhf.trainjob.pods import JOB_LABEL

RESOURCE = f"trainjobs.{GROUP}"
DELETION_SECONDS = 600.0  # for the pods of a job that is replaced: they may save a checkpoint


def create_or_adopt(api: Api, manifest: Object, *, is_delivered: Callable[[], bool]) -> Object:
    """The TrainJob of this stage in this run.

    A job of the same specification that waits, runs or has delivered its outputs is taken over; one that has failed, was made for
    other settings or inputs, or whose outputs are gone is replaced. Raises InputError if another object has the name.
    """
    name = manifest["metadata"]["name"]
    while True:
        try:
            # Strict: a Trainer without a field of the specification refuses it, and does not ignore it.
            job = api.request("POST", api.jobs, query={"fieldValidation": "Strict"}, body=manifest)
            api.say(f"created TrainJob {name}")
            return job
        except ApiError as error:
            if error.status != 409:
                raise explain(error, "create", RESOURCE, api.namespace) from None
        found = get_job(api, name)
        if found is None or found["metadata"].get("deletionTimestamp"):
            wait_until_gone(api, name, DELETION_SECONDS)
            continue
        if run_and_stage_of(found) != run_and_stage_of(manifest):
            raise InputError(
                f"A TrainJob {name} in namespace {api.namespace} belongs to something else "
                f"({run_and_stage_of(found) or 'it has no annotation of a run'}); delete or rename it."
            )
        reason = _why_replace(found, manifest, is_delivered)
        if not reason:
            api.say(f"found TrainJob {name}, which an earlier attempt of this task has created")
            return found
        api.say(f"replacing TrainJob {name}: {reason}")
        delete_job(api, found)
        wait_until_gone(api, name, DELETION_SECONDS)


def _why_replace(found: Object, manifest: Object, is_delivered: Callable[[], bool]) -> str:
    if digest_of(found) != digest_of(manifest):
        return "its settings, inputs or image differ from those of this task"
    if condition(found, "Failed"):
        return "it has failed"
    if condition(found, "Complete") and not is_delivered():
        return "it is complete, but its outputs are gone"
    return ""


def condition(job: Object, kind: str) -> Object | None:
    """The condition of a TrainJob, if it is true."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind and c.get("status") == "True"), None)


def get_job(api: Api, name: str) -> Object | None:
    try:
        return api.request("GET", f"{api.jobs}/{name}")
    except ApiError as error:
        if error.status == 404:
            return None
        raise explain(error, "get", RESOURCE, api.namespace) from None


def delete_job(api: Api, job: Object) -> None:
    """Delete this job, and not one that has been created under its name since; its pods go first."""
    options = {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": job["metadata"]["uid"]},
    }
    try:
        api.request("DELETE", f"{api.jobs}/{job['metadata']['name']}", body=options)
    except ApiError as error:
        if error.status not in (404, 409):  # gone, or replaced
            raise explain(error, "delete", RESOURCE, api.namespace) from None


def delete_jobs_of_run(api: Api, run_id: str, *, with_finished: bool) -> list[str]:
    """Delete the jobs that a run has left running, and with_finished those that have ended too; return their names."""
    if not is_label(run_id):
        return []
    try:
        answer = api.request("GET", api.jobs, query={"labelSelector": f"{RUN_LABEL}={run_id}"})
    except ApiError as error:
        raise explain(error, "list", RESOURCE, api.namespace) from None
    jobs = [
        job
        for job in answer.get("items") or []
        if with_finished or not (condition(job, "Complete") or condition(job, "Failed"))
    ]
    for job in jobs:
        delete_job(api, job)
    return [str(job["metadata"]["name"]) for job in jobs]


def wait_until_gone(api: Api, name: str, seconds: float) -> None:
    """Wait for a deleted job and its pods. Raises RetryableError if they are still there after so many seconds."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while True:
        # The server cannot say when the last of several objects goes, so that they are asked for; this takes seconds.
        found = get_job(api, name)
        if (found is None or not found["metadata"].get("deletionTimestamp")) and not pods_of(api, name):
            return
        if time.monotonic() > deadline:
            raise RetryableError(
                f"TrainJob {name} is still being deleted after {seconds:.0f} seconds; trying again later."
            )
        pause.wait(api.pause(0))


def pods_of(api: Api, name: str) -> list[Object]:
    """The pods of a job."""
    try:
        answer = api.request("GET", api.pods, query={"labelSelector": f"{JOB_LABEL}={name}"})
    except ApiError as error:
        raise explain(error, "list", "pods", api.namespace) from None
    return list(answer.get("items") or [])
