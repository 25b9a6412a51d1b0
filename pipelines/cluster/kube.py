"""Checks that the Secrets, ServiceAccount and volumes of a run exist in Kubernetes, before anything is created."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from components.rlhf.config.params import Params
from components.rlhf.config.scoring import key_variable
from components.rlhf.text.errors import InputError
from pipelines.access import cluster_storage
from pipelines.sources import is_on_hub, sources_of

TIMEOUT_SECONDS = 5.0


def check_cluster(params: Params, namespace: str, context: str | None) -> str:
    """Raise InputError for a missing object without which the run cannot start.

    context is a kubectl context: None is the current one, "" skips the check. Returns a note on optional objects that are missing
    and on what could not be checked, or "". A named context that cannot be used is an error, an unusable current one only a note.
    """
    if context == "":
        return ""
    from kubernetes import client, config

    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        core = client.CoreV1Api(config.new_client_from_config(context=context))
        core.api_client.configuration.retries = False
        name = context or config.list_kube_config_contexts()[1]["name"]
        core.read_namespace(namespace, _request_timeout=TIMEOUT_SECONDS)
    except Exception as error:  # errors of several libraries: no kubeconfig, context or server, or no permission
        reason = getattr(error, "reason", None) or (str(error).splitlines() or [type(error).__name__])[0]
        if context is not None:
            raise InputError(f"--kube-context {context}: namespace {namespace} cannot be read ({reason}).") from None
        return f"Secrets, ServiceAccount and volumes were not checked: kubectl's current context cannot read namespace {namespace}."
    unreadable = []
    for kind, required, read, advice in _required_objects(params, core):
        try:
            read(required, namespace, _request_timeout=TIMEOUT_SECONDS)
        except client.ApiException as error:
            if error.status == 404:
                raise InputError(
                    f"{kind} {required} does not exist in namespace {namespace} (kubectl context {name}); {advice}."
                ) from None
            unreadable.append(f"{kind} {required}")
    notes = [f"Could not be checked in namespace {namespace}: {', '.join(unreadable)}."] if unreadable else []
    for secret, consequence in _optional_secrets(params):
        try:
            core.read_namespaced_secret(secret, namespace, _request_timeout=TIMEOUT_SECONDS)
        except client.ApiException as error:
            if error.status == 404:
                notes.append(f"Secret {secret} does not exist in namespace {namespace}: {consequence}.")
    return " ".join(notes)


def _optional_secrets(params: Params) -> Iterator[tuple[str, str]]:
    """Name of each optional Secret, and the consequence if it is missing."""
    cluster = params.cluster
    if cluster.secrets.mlflow and params.tracking.enabled and not params.tracking.uri:
        yield cluster.secrets.mlflow, "the run is not tracked, and no model version is registered"
    on_hub = [source for source in sources_of(params) if is_on_hub(source)]
    if cluster.secrets.hf_token and on_hub:
        yield cluster.secrets.hf_token, f"{', '.join(on_hub)} can be downloaded only if public"
    with_key = [asked.url for asked in params.all_asked if key_variable(asked)]
    if cluster.secrets.judge and with_key:
        yield cluster.secrets.judge, f"{', '.join(with_key)} is asked without an API key"


def _required_objects(params: Params, core: Any) -> Iterator[tuple[str, str, Callable[..., Any], str]]:
    """Kind, name, API method and advice for each object without which a pod of the run does not start."""
    cluster, storage = params.cluster, cluster_storage(params)
    if cluster.service_account:
        yield (
            "ServiceAccount",
            cluster.service_account,
            core.read_namespaced_service_account,
            "apply an overlay of manifests/, or correct cluster.service_account",
        )
    if cluster.launcher == "trainjob":
        yield (
            "TrainingRuntime",
            cluster.runtime,
            _read_runtime(core),
            "install Kubeflow Trainer 2.2 or newer and add manifests/components/trainjob to your overlay, or correct cluster.runtime",
        )
    uris: list[str | None] = [*sources_of(params)]
    uris += [storage.checkpoint_uri, storage.publish_uri]
    uris += [storage.answers_uri] if params.keeps_answers else []
    if cluster.secrets.s3 and not storage.anonymous and any((uri or "").startswith("s3://") for uri in uris):
        yield (
            "Secret",
            cluster.secrets.s3,
            core.read_namespaced_secret,
            "create it with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or correct cluster.secrets.s3",
        )
    for secret in cluster.image_pull_secrets:
        yield "Secret", secret, core.read_namespaced_secret, "create it, or correct cluster.image_pull_secrets"
    for claim in cluster.claims.values():
        yield "PersistentVolumeClaim", claim, core.read_namespaced_persistent_volume_claim, "correct cluster.claims"
    if cluster.checkpoint_claim and not (params.storage.checkpoint_uri or "").startswith("s3://"):
        advice = "create it, correct cluster.checkpoint_claim, or set storage.checkpoint_uri to s3://..."
        yield "PersistentVolumeClaim", cluster.checkpoint_claim, _read_shared_claim(core), advice


def _read_runtime(core: Any) -> Callable[..., Any]:
    from kubernetes import client

    custom = client.CustomObjectsApi(core.api_client)

    def read(name: str, namespace: str, **options: Any) -> Any:
        return custom.get_namespaced_custom_object(
            "trainer.kubeflow.org", "v1alpha1", namespace, "trainingruntimes", name, **options
        )

    return read


def _read_shared_claim(core: Any) -> Callable[..., Any]:
    def read(name: str, namespace: str, **options: Any) -> Any:
        claim = core.read_namespaced_persistent_volume_claim(name, namespace, **options)
        modes = claim.spec.access_modes or []
        if "ReadWriteMany" not in modes:
            raise InputError(
                f"PersistentVolumeClaim {name} (cluster.checkpoint_claim) has the access mode {', '.join(modes)}: a second run on another "
                "node could not mount it; use one with ReadWriteMany, cluster.checkpoint_volume for a claim per run, or "
                "storage.checkpoint_uri in S3."
            )
        return claim

    return read
