"""Submission to Kubeflow Pipelines: check everything, upload a version of the pipeline, and start a run of it."""

import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server_api.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from components.rlhf.tracking.texts import equals
from pipelines.access import CHECKPOINT_PATH, cluster_storage
from pipelines.cluster import versions
from pipelines.cluster.kube import check_cluster
from pipelines.cluster.pods import PendingPods
from pipelines.cluster.server import Server, ServerAccess, connect, translate_api_errors
from pipelines.cluster.upload import plan_upload, upload
from pipelines.compile import compile_pipeline
from pipelines.placement import (
    require_allowed_code,
    require_checkpoints_for_budget,
    require_digests,
    require_place_for_approval,
)
from pipelines.plan import refuse_what_cannot_fit
from pipelines.preflight import check_inputs
from pipelines.sources import is_on_mounted_volume, is_within

Log = Callable[[str], None]
EXIT_CODES = {"SUCCEEDED": 0, "FAILED": 1, "SKIPPED": 1, "CANCELED": 1}
DEFAULT_NAMESPACE = "kubeflow"  # where a single-user server starts its pods
MAX_OUTAGE_SECONDS = 300.0


@dataclass(frozen=True)
class SubmitOptions:
    """Options of the run, and of the checks before it."""

    experiment: str
    name: str | None = None
    cron: str | None = None
    kube_context: str | None = None
    poll_seconds: float = 15.0


def check_params(params: Params) -> None:
    """Raise InputError for parameters that cannot work on a cluster, and for invalid local models and data."""
    require_digests(params.cluster)
    require_checkpoints_for_budget(params)
    require_place_for_approval(params)
    require_allowed_code(params)
    checkpoints = params.storage.checkpoint_uri
    if checkpoints and not checkpoints.startswith("s3://"):
        if not is_within(checkpoints.removeprefix("file://"), CHECKPOINT_PATH):
            raise InputError(
                f"storage.checkpoint_uri is {checkpoints}, a folder that pods do not have; set it to s3://BUCKET/PREFIX, or to "
                f"null for a volume (at {CHECKPOINT_PATH})."
            )
        if not (params.cluster.checkpoint_claim or params.cluster.checkpoint_volume):
            raise InputError(
                "storage.checkpoint_uri is on a volume, but cluster.checkpoint_claim and cluster.checkpoint_volume are null; "
                "set one of them."
            )
    tracking = params.tracking.uri or ""
    if params.tracking.enabled and tracking and not tracking.startswith(("http://", "https://", "databricks")):
        raise InputError(
            f"tracking.uri is {tracking}, which is on this machine; set it to the http(s) address of an MLflow server, or to "
            "null for the server in the Secret cluster.secrets.mlflow."
        )
    for key in ("publish_uri", "answers_uri"):
        uri = getattr(params.storage, key)
        if uri and not uri.startswith("s3://"):
            raise InputError(f"storage.{key} is {uri}, a folder that pods do not have; set it to s3://BUCKET/PREFIX.")
    check_inputs(params, is_on_cluster=lambda source: is_on_mounted_volume(source, params))


def notes_on(params: Params) -> Iterator[str]:
    """What a user should know before a run starts, although it is no error."""
    storage = cluster_storage(params)
    if not storage.checkpoint_uri:
        yield (
            "no checkpoints are saved: a stage that is retried starts from the beginning. Set storage.uri to s3://BUCKET/PREFIX, or "
            "cluster.checkpoint_volume."
        )
    if params.tracking.enabled and not storage.publish_uri:
        yield (
            "no model is published: the registered model version will name an address in the store of Kubeflow Pipelines, which "
            "MLflow may not be able to open."
        )
    if params.reward_model_judge and "judge" not in params.cluster.stages:
        profile = params.cluster.default_profile
        yield (
            f"the stage judge loads the second reward model on the profile {profile} ({params.cluster.profile('judge').memory} of memory); "
            "set cluster.stages.judge to a profile with more if that is too little."
        )
    if params.keeps_answers and not storage.answers_uri:
        yield (
            "the answers of endpoints are not kept: a stage that is retried, and the next run, ask the endpoint again. Set storage.uri or "
            "storage.answers_uri to s3://BUCKET/PREFIX."
        )


def check_cron(cron: str) -> None:
    """Raise InputError unless cron has the six fields of Kubeflow Pipelines, seconds first, or is like @daily."""
    fields = cron.split()
    if cron.startswith("@") and len(fields) in (1, 2):
        return
    if len(fields) != 6 or not all(re.fullmatch(r"[\w*/,?\-]+", field) for field in fields):
        example = f'"0 {cron}"' if len(fields) == 5 else '"0 0 3 * * *" (every night at 3)'
        raise InputError(
            f"--recurring {cron!r} is not a cron expression of six fields, seconds first; write {example}."
        )


def dry_run(params: Params, access: ServerAccess, options: SubmitOptions, log: Log) -> None:
    """Log what a submission would change, and change nothing."""
    params, uploads, server = _check(params, access, options, log)
    with tempfile.TemporaryDirectory() as folder:
        package = compile_pipeline(params, Path(folder) / "pipeline.yaml")
        name = versions.version_name(params.cluster.pipeline, package)
        pipeline_id = versions.find_pipeline(server, access, params.cluster.pipeline)
        latest = versions.latest_version(server, access, pipeline_id) if pipeline_id else None
        for file, key in uploads:
            log(f"would upload {file} to {params.storage.uri}/{key} unless it exists")
        if latest is None:
            log(f"would upload {name}, the first version of the pipeline {params.cluster.pipeline}")
            return
        lines = versions.differences(latest.pipeline_spec, package)
        if not lines:
            log(f"no difference from {latest.display_name}, the latest version")
            return
        log(f"would upload {name}; {len(lines)} differences from {latest.display_name}, the latest version:")
        for line in lines:
            log(line)


def submit(params: Params, access: ServerAccess, options: SubmitOptions, log: Log) -> tuple[Server, str]:
    """Start a run or create a recurring run; return the server and its id. Nothing is created before every check has passed."""
    params, uploads, server = _check(params, access, options, log)
    with tempfile.TemporaryDirectory() as folder:
        package = compile_pipeline(params, Path(folder) / "pipeline.yaml")
        upload(params, uploads, log)
        pipeline_id, version_id = versions.upload(server, access, params.cluster.pipeline, package)
        log(f"version  {versions.version_name(params.cluster.pipeline, package)}")
    with translate_api_errors(access):
        experiment = server.client.create_experiment(
            options.experiment, namespace=access.namespace if server.multi_user else None
        )
        request = {
            "experiment_id": experiment.experiment_id,
            "job_name": options.name or f"{params.preset} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "service_account": params.cluster.service_account,
        }
        if options.cron:
            run_id = server.client.create_recurring_run(
                **request, cron_expression=options.cron, max_concurrency=1, no_catchup=True
            ).recurring_run_id
        else:
            run_id = server.client.run_pipeline(**request).run_id
    ui = (params.cluster.ui_url or access.host).rstrip("/")
    if options.cron:
        log(f"schedule {ui}/#/recurringrun/details/{run_id}")
    else:
        log(f"run      {ui}/#/runs/details/{run_id}")
        namespace = shlex.quote(access.namespace or DEFAULT_NAMESPACE)
        log(f"pods     kubectl -n {namespace} get pods -l {shlex.quote(f'pipeline/runid={run_id}')}")
    log(f"mlflow   {mlflow_link(params, None if options.cron else run_id)}")
    return server, run_id


def mlflow_link(params: Params, run_id: str | None) -> str:
    """Where the run is in MLflow."""
    if not params.tracking.enabled:
        return "off (tracking.enabled is false)"
    search = f"experiment {params.tracking.experiment}" + (
        f", {equals('tags.`rlhf.run_id`', run_id)}" if run_id else ""
    )
    if params.tracking.uri:
        return f"{params.tracking.uri.rstrip('/')}/#/experiments: {search}"
    if not params.cluster.secrets.mlflow:
        return "off (tracking.uri and cluster.secrets.mlflow are null)"
    return f"the server of Secret {params.cluster.secrets.mlflow}: {search}"


def wait(server: Server, access: ServerAccess, run_id: str, options: SubmitOptions, log: Log) -> int:
    """Log the states of a run until it ends, and why pods are pending; return 0 if it succeeded, else 1.

    Outages of the server are tolerated for minutes.
    """
    last_state, outage_start = "", 0.0
    pods = PendingPods(access.namespace or DEFAULT_NAMESPACE, run_id, options.kube_context)
    while True:
        try:
            run: Any = server.client.get_run(run_id)
            outage_start = 0.0
        except (ApiException, HTTPError) as error:
            outage_start = outage_start or time.monotonic()
            permanent = isinstance(error, ApiException) and error.status in (401, 403, 404)
            if permanent or time.monotonic() - outage_start > MAX_OUTAGE_SECONDS:
                with translate_api_errors(access):
                    raise
            time.sleep(options.poll_seconds)
            continue
        state = str(run.state or "PENDING")
        if state != last_state:
            log(f"state    {state.lower()}")
            last_state = state
        if state in EXIT_CODES:
            if run.error and run.error.message:
                log(f"error    {run.error.message}")
            return EXIT_CODES[state]
        for reason in pods.new_reasons():
            log(f"pending  {reason}")
        time.sleep(options.poll_seconds)


def _check(
    params: Params, access: ServerAccess, options: SubmitOptions, log: Log
) -> tuple[Params, list[tuple[Path, str]], Server]:
    """Run every check; return the params and uploads of plan_upload, and the server."""
    if options.cron:
        check_cron(options.cron)
    check_params(params)
    unplanned = refuse_what_cannot_fit(params)
    cluster_params, uploads = plan_upload(params)
    server = connect(access)
    note = check_cluster(cluster_params, access.namespace or DEFAULT_NAMESPACE, options.kube_context)
    for text in filter(None, [note, unplanned, *notes_on(cluster_params)]):
        log(f"note     {text}")
    return cluster_params, uploads, server
