"""Submitting: everything is checked before anything is created; then a version is uploaded and a run of it started."""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server_api.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.cluster import versions
from pipelines.cluster.kube import check_cluster
from pipelines.cluster.server import Server, ServerAccess, connect, translate_api_errors
from pipelines.cluster.upload import is_on_mounted_volume, plan_upload, upload
from pipelines.compile import compile_pipeline
from pipelines.placement import CHECKPOINTS, is_within, require_digests
from pipelines.preflight import check_inputs

Log = Callable[[str], None]
ENDS = {"SUCCEEDED": 0, "FAILED": 1, "SKIPPED": 1, "CANCELED": 1}
DEFAULT_NAMESPACE = "kubeflow"  # where a server for one user starts its pods
MAX_OUTAGE_SECONDS = 300.0


@dataclass(frozen=True)
class SubmitOptions:
    """What is to be submitted, and how."""

    experiment: str
    name: str | None = None
    cron: str | None = None
    kube_context: str | None = None
    poll_seconds: float = 15.0


def check_params(params: Params) -> None:
    """Raise InputError for whatever could not run on a cluster, and for local files that a stage would refuse."""
    require_digests(params.cluster)
    checkpoints = params.storage.checkpoint_uri
    if checkpoints and not checkpoints.startswith("s3://"):
        if not is_within(checkpoints.removeprefix("file://"), CHECKPOINTS):
            raise InputError(
                f"storage.checkpoint_uri is {checkpoints}, a folder that no pod has; leave it null for the volume "
                f"cluster.checkpoint_claim (at {CHECKPOINTS}), or write s3://BUCKET/PREFIX."
            )
        if not params.cluster.checkpoint_claim:
            raise InputError("storage.checkpoint_uri is on a volume, and cluster.checkpoint_claim names none; name it.")
    tracking = params.tracking.uri or ""
    if params.tracking.enabled and tracking and not tracking.startswith(("http://", "https://", "databricks")):
        raise InputError(
            f"tracking.uri is {tracking}, which is on this machine; write the http(s) address of an MLflow server, or leave it "
            "null for the one of the Secret cluster.secrets.mlflow."
        )
    publish = params.storage.publish_uri
    if publish and not publish.startswith("s3://"):
        raise InputError(f"storage.publish_uri is {publish}, a folder that no pod has; write s3://BUCKET/PREFIX.")
    check_inputs(params, elsewhere=lambda source: is_on_mounted_volume(source, params))


def check_cron(cron: str) -> None:
    """Raise InputError for anything but the six fields that Kubeflow Pipelines takes, seconds first."""
    fields = cron.split()
    if cron.startswith("@") and len(fields) in (1, 2):
        return
    if len(fields) != 6 or not all(re.fullmatch(r"[\w*/,?\-]+", field) for field in fields):
        example = f'"0 {cron}"' if len(fields) == 5 else '"0 0 3 * * *" (every night at 3)'
        raise InputError(
            f"--recurring {cron!r} has {len(fields)} fields, and six are wanted, seconds first: {example}."
        )


def dry_run(params: Params, access: ServerAccess, options: SubmitOptions, log: Log) -> None:
    """Say what a submission would change, and change nothing."""
    params, copies = _checked(params, options)
    server = _reach(params, access, options, log)
    with tempfile.TemporaryDirectory() as folder:
        package = compile_pipeline(params, Path(folder) / "pipeline.yaml")
        name = versions.version_name(params.cluster.pipeline, package)
        pipeline_id = versions.find_pipeline(server, access, params.cluster.pipeline)
        last = versions.newest_version(server, access, pipeline_id) if pipeline_id else None
        for file, key in copies:
            log(f"would copy {file} to {params.storage.uri}/{key}, unless it is there")
        if last is None:
            log(f"would upload {name}, the first version of the pipeline {params.cluster.pipeline}")
            return
        lines = versions.differences(last.pipeline_spec, package)
        if not lines:
            log(f"no difference from {last.display_name}, the last version")
            return
        log(f"would upload {name}; {len(lines)} differences from {last.display_name}, the last version:")
        for line in lines:
            log(line)


def submit(params: Params, access: ServerAccess, options: SubmitOptions, log: Log) -> tuple[Server, str]:
    """Start a run, or schedule recurring ones; return the server and the id. Nothing is created before everything is checked."""
    params, copies = _checked(params, options)
    server = _reach(params, access, options, log)
    with tempfile.TemporaryDirectory() as folder:
        package = compile_pipeline(params, Path(folder) / "pipeline.yaml")
        upload(params, copies, log)
        pipeline_id, version_id = versions.upload(server, access, params.cluster.pipeline, package)
        log(f"version  {versions.version_name(params.cluster.pipeline, package)}")
    with translate_api_errors(access):
        experiment = server.client.create_experiment(
            options.experiment, namespace=access.namespace if server.multi_user else None
        )
        job = {
            "experiment_id": experiment.experiment_id,
            "job_name": options.name or f"{params.preset} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "service_account": params.cluster.service_account,
        }
        if options.cron:
            made = server.client.create_recurring_run(
                **job, cron_expression=options.cron, max_concurrency=1, no_catchup=True
            ).recurring_run_id
        else:
            made = server.client.run_pipeline(**job).run_id
    ui = (params.cluster.ui_url or access.host).rstrip("/")
    log(
        f"{'schedule' if options.cron else 'run     '} {ui}/#/{'recurringrun' if options.cron else 'runs'}/details/{made}"
    )
    if not options.cron:
        log(f"pods     kubectl -n {access.namespace or DEFAULT_NAMESPACE} get pods -l pipeline/runid={made}")
    log(f"mlflow   {mlflow_link(params, None if options.cron else made)}")
    return server, made


def mlflow_link(params: Params, run_id: str | None) -> str:
    """Where to see the run in MLflow, or how to get there."""
    if not params.tracking.enabled:
        return "off (tracking.enabled)"
    where = f"experiment {params.tracking.experiment}"
    where += f", tags.`rlhf.run_id` = '{run_id}'" if run_id else ""
    if params.tracking.uri:
        return f"{params.tracking.uri.rstrip('/')}/#/experiments: {where}"
    if not params.cluster.secrets.mlflow:
        return "off (neither tracking.uri nor cluster.secrets.mlflow)"
    return f"the server of Secret {params.cluster.secrets.mlflow}: {where}"


def wait(server: Server, access: ServerAccess, run_id: str, options: SubmitOptions, log: Log) -> int:
    """Follow a run to its end; return 0 when it succeeded, else 1. A server that is away for minutes is waited for."""
    shown, away_since = "", 0.0
    while True:
        try:
            run: Any = server.client.get_run(run_id)
            away_since = 0.0
        except (ApiException, HTTPError) as error:
            away_since = away_since or time.monotonic()
            refused = isinstance(error, ApiException) and error.status in (401, 403, 404)
            if refused or time.monotonic() - away_since > MAX_OUTAGE_SECONDS:
                with translate_api_errors(access):
                    raise
            time.sleep(options.poll_seconds)
            continue
        state = str(run.state or "PENDING")
        if state != shown:
            log(f"state    {state.lower()}")
            shown = state
        if state in ENDS:
            if run.error and run.error.message:
                log(f"error    {run.error.message}")
            return ENDS[state]
        time.sleep(options.poll_seconds)


def _checked(params: Params, options: SubmitOptions) -> tuple[Params, list[tuple[Path, str]]]:
    if options.cron:
        check_cron(options.cron)
    check_params(params)
    return plan_upload(params)


def _reach(params: Params, access: ServerAccess, options: SubmitOptions, log: Log) -> Server:
    server = connect(access)
    skipped = check_cluster(params, access.namespace or DEFAULT_NAMESPACE, options.kube_context)
    if skipped:
        log(f"note     {skipped}")
    return server
