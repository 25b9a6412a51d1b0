"""What the tasks of a run name in Kubernetes (Secrets, an account, volumes), looked up before anything is created."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from components.rlhf.config.params import Params
from components.rlhf.storage.pypi import PREFIX
from components.rlhf.text.errors import InputError
from pipelines.placement import cluster_storage, data_sources, is_remote

SECONDS = 5.0
NOT_CHECKED = "Secrets, account and volumes were not looked up"


def check_cluster(params: Params, namespace: str, context: str | None) -> str:
    """Raise InputError for the first thing that the run needs and the namespace lacks; return what could not be looked up, and what
    goes on without, or "".

    context is kubectl's; None is the current one, and "" asks nobody. A cluster that cannot be asked is no mistake, but one that
    was named is, and so is one that runs no Kubeflow Pipelines.
    """
    if context == "":
        return ""
    from kubernetes import client, config

    logging.getLogger("urllib3").setLevel(logging.ERROR)
    try:
        core = client.CoreV1Api(config.new_client_from_config(context=context))
        core.api_client.configuration.retries = False
        name = context or config.list_kube_config_contexts()[1]["name"]
        core.read_namespace(namespace, _request_timeout=SECONDS)
    except Exception as error:  # no file, no such context, no server, no right: many libraries' errors
        reason = getattr(error, "reason", None) or (str(error).splitlines() or [type(error).__name__])[0]
        if context is not None:
            raise InputError(
                f"--kube-context {context} cannot be asked about namespace {namespace} ({reason})."
            ) from None
        return f"{NOT_CHECKED} (kubectl's current context cannot be asked about namespace {namespace})."
    skipped = []
    for what, wanted, read, advice in _required_resources(params, core):
        try:
            read(wanted, namespace, _request_timeout=SECONDS)
        except client.ApiException as error:
            if error.status != 404:
                skipped.append(f"{what} {wanted}")
                continue
            raise InputError(
                f"{what} {wanted} does not exist in namespace {namespace} (kubectl context {name}); {advice}."
            ) from None
    notes = [f"Could not be looked up in namespace {namespace}: {', '.join(skipped)}."] if skipped else []
    for secret, consequence in _optional_secrets(params):
        try:
            core.read_namespaced_secret(secret, namespace, _request_timeout=SECONDS)
        except client.ApiException as error:
            if error.status == 404:
                notes.append(f"Secret {secret} does not exist in namespace {namespace}: {consequence}.")
    return " ".join(notes)


def _optional_secrets(params: Params) -> Iterator[tuple[str, str]]:
    """Secrets that a run does without, and what is lost."""
    cluster, source = params.cluster, params.model.source
    if cluster.secrets.mlflow and params.tracking.enabled and not params.tracking.uri:
        yield cluster.secrets.mlflow, "the run is tracked nowhere, and no version is registered"
    if cluster.secrets.hf_token and is_remote(source) and not source.startswith(PREFIX):
        yield cluster.secrets.hf_token, f"{source} can be fetched only if it is public"


def _required_resources(params: Params, core: Any) -> Iterator[tuple[str, str, Callable[..., Any], str]]:
    """Kind, name, how it is read, and what to do when it is not there. Secrets that may be missing are not asked for."""
    cluster, stored = params.cluster, cluster_storage(params)
    if cluster.service_account:
        yield (
            "ServiceAccount",
            cluster.service_account,
            core.read_namespaced_service_account,
            "apply an overlay of manifests/, or name another in cluster.service_account",
        )
    uris = [params.model.source, params.sft.use, params.reward_model.use, *data_sources(params)]
    uris += [stored.checkpoint_uri, stored.publish_uri]
    if cluster.secrets.s3 and not stored.anonymous and any((uri or "").startswith("s3://") for uri in uris):
        yield (
            "Secret",
            cluster.secrets.s3,
            core.read_namespaced_secret,
            "create it with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name another in cluster.secrets.s3",
        )
    for secret in cluster.image_pull_secrets:
        yield "Secret", secret, core.read_namespaced_secret, "create it, or correct cluster.image_pull_secrets"
    claims = [(claim, "correct cluster.claims") for claim in cluster.claims.values()]
    if cluster.checkpoint_claim and not (params.storage.checkpoint_uri or "").startswith("s3://"):
        advice = "apply an overlay of manifests/, name another in cluster.checkpoint_claim, or set storage.checkpoint_uri to s3://..."
        claims.append((cluster.checkpoint_claim, advice))
    for claim, advice in claims:
        yield "PersistentVolumeClaim", claim, core.read_namespaced_persistent_volume_claim, advice
