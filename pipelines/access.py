"""Where the stages of a run on a cluster keep their files, and the Secrets with which they reach them and other servers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from components.rlhf.config.cluster import TRAINING_STAGES
from components.rlhf.config.params import Params
from components.rlhf.config.scoring import Endpoint, key_variable
from components.rlhf.config.storage import StorageConfig
from pipelines.sources import is_on_hub

CHECKPOINT_PATH = "/checkpoints"
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_OPTIONAL_KEYS = ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION")
MLFLOW_KEYS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class SecretVariables:
    """Keys of a Secret as environment variables."""

    name: str
    variables: Mapping[str, str]  # key -> variable
    optional: bool


def cluster_storage(params: Params) -> StorageConfig:
    """The storage settings of a run on a cluster.

    Without a URI of their own, checkpoints are on a volume if there is one, else in storage.uri, and so are published models.
    """
    storage, volume = params.storage, params.cluster.checkpoint_claim or params.cluster.checkpoint_volume
    root = storage.uri.rstrip("/") if storage.uri and storage.uri.startswith("s3://") else None
    checkpoint_uri = storage.checkpoint_uri or (CHECKPOINT_PATH if volume else root and f"{root}/checkpoints")
    publish_uri = storage.publish_uri or (root and f"{root}/models")
    answers_uri = storage.answers_uri or (root and f"{root}/answers")
    return storage.model_copy(
        update={"uri": None, "checkpoint_uri": checkpoint_uri, "publish_uri": publish_uri, "answers_uri": answers_uri}
    )


def keeps_files(stage: str, params: Params) -> bool:
    """Whether a stage uses storage.checkpoint_uri: for checkpoints, or to exchange files with the pods of a TrainJob."""
    return stage in TRAINING_STAGES or params.cluster.launches(stage)


def secrets_of(stage: str, params: Params, sources: list[str]) -> Iterator[SecretVariables]:
    """The Secrets that the pods of a stage read as environment variables."""
    secrets = params.cluster.secrets
    yield from s3_secrets_of(stage, params, sources)
    if secrets.mlflow and params.tracking.enabled:
        yield _same_names(secrets.mlflow, MLFLOW_KEYS, optional=True)
    if secrets.hf_token and any(is_on_hub(source) for source in sources):
        yield _same_names(secrets.hf_token, ("HF_TOKEN",), optional=True)
    if secrets.judge:
        variables = sorted({variable for asked in params.asked_by(stage) if (variable := key_variable(asked))})
        if variables:
            yield _same_names(secrets.judge, tuple(variables), optional=True)
    asks = stage == "register" and params.gate.approval == "required"
    if secrets.webhook and (stage == "notify" or asks):
        keys = {"WEBHOOK_URL": "RLHF_WEBHOOK_URL"}  # WEBHOOK_URL may have another meaning on a laptop
        yield SecretVariables(secrets.webhook, keys, optional=True)


def s3_secrets_of(stage: str, params: Params, sources: list[str]) -> Iterator[SecretVariables]:
    """The Secrets with which the pods of a stage, and a task that launches it, reach S3."""
    name, storage = params.cluster.secrets.s3, cluster_storage(params)
    uris = [*sources]
    if keeps_files(stage, params) or stage == "notify":  # which deletes what is left of the checkpoints
        uris += [storage.checkpoint_uri or ""]
    if stage in TRAINING_STAGES:
        uris += [storage.publish_uri or ""]
    if any(isinstance(asked, Endpoint) for asked in params.asked_by(stage)):
        uris += [storage.answers_uri or ""]
    if name and not storage.anonymous and any(uri.startswith("s3://") for uri in uris):
        # Not optional: Kubernetes reports a pod whose Secret is missing, while the stage would only fail later.
        yield _same_names(name, S3_KEYS, optional=False)
        yield _same_names(name, S3_OPTIONAL_KEYS, optional=True)


def _same_names(name: str, keys: tuple[str, ...], *, optional: bool) -> SecretVariables:
    return SecretVariables(name, {key: key for key in keys}, optional)
