"""A task that runs its stage as a TrainJob: inputs to the shared storage, the job, and its outputs to where KFP expects them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.rlhf.checkpoints.run import delete_run_if_empty, mark_run
from components.rlhf.config.storage import SETTINGS_VARIABLE, StorageConfig
from components.rlhf.config.trainjob import NAMESPACE_VARIABLE, PLAN_VARIABLE, POD_VARIABLE, TrainJobPlan
from components.rlhf.storage.store import Store, open_store
from components.rlhf.text.errors import InputError, RetryableError
from components.rlhf.trainjob import exchange
from components.rlhf.trainjob.api import Api, ApiError, Object, connect, explain
from components.rlhf.trainjob.jobs import create_or_adopt, delete_job, get_job, wait_until_gone
from components.rlhf.trainjob.manifest import StageCall, digest_of, run_and_stage_of, trainjob
from components.rlhf.trainjob.wait import wait_for
from components.rlhf.trainjob.worker import OUTPUTS_VARIABLE

GRACE_SECONDS = 25.0  # Kubernetes kills a pod 30 seconds after SIGTERM
LAST_STAGE = "evaluation"  # after which no stage is launched, so that the inputs of all are needed no more
Log = Callable[[str], None]


class Cancelled(BaseException):
    """SIGTERM or Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


@dataclass(frozen=True, kw_only=True)
class Task:
    """A call of a stage program by KFP."""

    stage: str  # its name in this run
    module: str  # components.sft
    run_id: str
    num_processes: int
    settings: str
    tracking: str
    storage: str
    executor_input: str
    reads: Mapping[str, Path]  # option -> folder; options that are not given are left out
    writes: Mapping[str, Path]


def launch(task: Task, log: Log, *, api: Api | None = None) -> None:
    """Run a stage as a TrainJob and take over its outputs. Raises InputError.

    The job survives this process, so that another attempt finds it, unless the task was cancelled or cannot succeed.
    """
    plan, config = read_plan(), StorageConfig.from_json(task.storage)
    if not config.checkpoint_uri:
        raise InputError(
            "A TrainJob needs storage that the task and all nodes share; set storage.uri to s3://BUCKET/PREFIX, or "
            "cluster.checkpoint_claim to a ReadWriteMany claim."
        )
    store = open_store(config.checkpoint_uri, config, log)
    api = api or connect(_variable(NAMESPACE_VARIABLE), log)
    with cancellation():
        owner = owner_of(api, _variable(POD_VARIABLE))
        mark_run(store, task.run_id)
        manifest = trainjob(plan, _call(task, store, owner, log))
        key = exchange.outputs_key(task.run_id, task.stage)
        digest = digest_of(manifest)

        def delivery() -> exchange.Delivery | None:
            return exchange.read_delivery(store, key, digest)

        with deleted_if_cancelled(api, manifest):
            job = create_or_adopt(api, manifest, is_delivered=lambda: delivery() is not None)
            failure = wait_for(api, job, lambda line: print(line, flush=True))
        if failure:
            raise failure
        found = delivery()
        if found is None:
            raise RetryableError(
                f"TrainJob {job['metadata']['name']} is complete, but {store.uri}/{key} has no outputs of it; the stage runs again."
            )
        exchange.collect(store, key, found, task.writes)
        if task.executor_input:
            exchange.write_executor_output(store, key, task.executor_input)
        log(f"outputs taken from {store.uri}/{key}")
    if task.stage == LAST_STAGE and not config.checkpoint_uri.startswith("s3://"):  # in S3, notify deletes them
        exchange.delete_exchange(store, task.run_id)
        delete_run_if_empty(store, task.run_id)


def read_plan() -> TrainJobPlan:
    try:
        return TrainJobPlan.from_json(os.environ[PLAN_VARIABLE])
    except ValidationError as error:
        raise InputError(
            f"{PLAN_VARIABLE} is not what this version writes ({error.errors()[0]['msg']}); compile the pipeline again."
        ) from None


def _variable(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise InputError(f"{name} is not set, which the pipeline sets on a cluster; compile it again.")
    return value


def _call(task: Task, store: Store, owner: Object | None, log: Log) -> StageCall:
    """The command of the pods; inputs are copied to the shared storage first."""
    outputs = f"{store.uri}/{exchange.outputs_key(task.run_id, task.stage)}"
    values = {
        **{name: f"{store.uri}/{exchange.upload_input(store, task.run_id, p, log)}" for name, p in task.reads.items()},
        **{name: f"{outputs}/files/{name}" for name in task.writes},
        "settings": task.settings,
        "tracking": task.tracking,
        "storage": task.storage,
    }
    settings = {name: os.environ[name] for name in (SETTINGS_VARIABLE,) if name in os.environ}
    return StageCall(
        stage=task.stage,
        module=task.module,
        run_id=task.run_id,
        num_processes=task.num_processes,
        options=[part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)],
        executor_input=task.executor_input,
        environment={"RLHF_RUN_ID": task.run_id, OUTPUTS_VARIABLE: outputs, **settings},
        owner=owner,
    )


def owner_of(api: Api, pod: str) -> Object | None:
    """A reference to the Workflow that owns this pod: the job outlives the pod for the next attempt, and goes with the run."""
    try:
        metadata: Object = api.request("GET", f"{api.pods}/{pod}")["metadata"]
    except ApiError as error:
        raise explain(error, "get", "pods", api.namespace) from None
    owner: dict[str, Any] | None = next(
        (o for o in metadata.get("ownerReferences") or [] if o.get("kind") == "Workflow"), None
    )
    if owner is None:
        api.say("this pod belongs to no Workflow, so that its TrainJob will not be deleted with the run")
        return None
    return {key: owner[key] for key in ("apiVersion", "kind", "name", "uid")}


@contextmanager
def cancellation() -> Iterator[None]:
    """Raise Cancelled in the block at SIGTERM and Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(number: int, _frame: object) -> None:
        for later in (signal.SIGTERM, signal.SIGINT):
            signal.signal(later, signal.SIG_IGN)  # the job is being deleted
        raise Cancelled(number)

    previous = {number: signal.signal(number, cancel) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def deleted_if_cancelled(api: Api, manifest: Object) -> Iterator[None]:
    """Delete the job of this stage and wait for its pods, if the task is cancelled, or cannot watch the job and never will."""
    try:
        yield
    except RetryableError:
        raise
    except (Cancelled, InputError):
        name = manifest["metadata"]["name"]
        api.outage_seconds = GRACE_SECONDS
        try:
            job = get_job(api, name)
            if job and run_and_stage_of(job) == run_and_stage_of(manifest):
                api.say(f"deleting TrainJob {name}")
                delete_job(api, job)
                wait_until_gone(api, name, GRACE_SECONDS)
                api.say(f"TrainJob {name} is deleted")
        except InputError as error:
            api.say(f"TrainJob {name} may still run ({error})")
        raise
