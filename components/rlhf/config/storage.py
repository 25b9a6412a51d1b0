"""Settings of checkpoints, storage and experiment tracking."""

import posixpath
from itertools import combinations

from pydantic import ValidationInfo, field_validator, model_validator

from components.rlhf.config.base import BaseConfig, NonNegative, PositiveInt

UPLOADS = "uploads"  # folder in storage.uri

SETTINGS_VARIABLE = "RLHF_SETTINGS"  # of every task: the settings of the run that are not defaults, as JSON


class CheckpointConfig(BaseConfig):
    """How often a training stage saves a checkpoint to resume from."""

    every_minutes: NonNegative = 5.0
    """Minutes between checkpoints; a crash loses at most this much work, plus the time to write one."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""


class StorageConfig(BaseConfig):
    """Location of checkpoints and published models, and access to S3. Credentials come from the environment."""

    uri: str | None = None
    """s3://BUCKET/PREFIX (or a folder of cluster.claims) of submitted runs: local files are uploaded to URI/uploads."""
    checkpoint_uri: str | None = None
    """Folder or s3://BUCKET/PREFIX for checkpoints; null is the run directory here, and on a cluster a volume or URI/checkpoints."""
    publish_uri: str | None = None
    """Folder or s3://BUCKET/PREFIX for trained models, as RUN_ID/STAGE/model; null is nothing here, and URI/models on a cluster."""
    answers_uri: str | None = None
    """Folder or s3://BUCKET/PREFIX for the answers of endpoints; null is ~/.cache/kfp-rlhf, and URI/answers on a cluster."""
    endpoint_url: str | None = None
    """Endpoint of an S3 server other than AWS: http(s)://HOST:PORT."""
    region: str | None = None
    """Region of the buckets; null uses AWS_REGION."""
    path_style: bool | None = None
    """Address buckets in the path instead of the host name; null is true if an endpoint is set."""
    ca_bundle: str | None = None
    """PEM file with the CA that signed the server's certificate."""
    anonymous: bool = False
    """Send no credentials, for public buckets."""
    retry_minutes: NonNegative = 10.0
    """Minutes for which a failing request is retried before the stage fails."""

    @field_validator("endpoint_url")
    @classmethod
    def _require_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("write it as http://HOST:PORT or https://HOST:PORT")
        return value

    @field_validator("checkpoint_uri", "uri", "publish_uri", "answers_uri")
    @classmethod
    def _require_store_uri(cls, value: str | None) -> str | None:
        scheme, separator, rest = (value or "").partition("://")
        if separator and (scheme not in ("s3", "file") or not rest.strip("/")):
            raise ValueError("write s3://BUCKET/PREFIX or a folder")
        return value

    @model_validator(mode="after")
    def _require_separate_places(self) -> "StorageConfig":
        uris = {key: uri for key in ("checkpoint_uri", "publish_uri", "answers_uri") if (uri := getattr(self, key))}
        uris |= {"uri": f"{self.uri.rstrip('/')}/{UPLOADS}"} if self.uri else {}
        for (key, uri), (other_key, other) in combinations(uris.items(), 2):
            if contains(uri, other) or contains(other, uri):
                relation = "equal to" if contains(uri, other) and contains(other, uri) else "inside, or contains,"
                raise ValueError(
                    f"{key} is {uri}, which is {relation} {other_key} ({other}); checkpoints are deleted, so use separate "
                    "prefixes, such as s3://BUCKET/checkpoints and s3://BUCKET/models"
                )
        return self


def contains(uri: str, other: str) -> bool:
    """Whether other is the same location as uri or inside it, for folders and s3:// URIs."""

    def parts(location: str) -> list[str]:
        if location.startswith("s3://"):
            return ["s3:", *(part for part in location.removeprefix("s3://").split("/") if part)]
        return posixpath.normpath(location.removeprefix("file://")).split("/")

    outer, inner = parts(uri), parts(other)
    return inner[: len(outer)] == outer


class TrackingConfig(BaseConfig):
    """Experiment tracking in MLflow."""

    enabled: bool = True
    """Log to MLflow."""
    uri: str | None = None
    """MLflow tracking URI; null is mlflow.db in the run directory (with --out) or next to it, and MLFLOW_TRACKING_URI on a cluster."""
    ui_url: str | None = None
    """URL at which people open MLflow, for links in notifications; null is uri."""
    experiment: str = "kfp-rlhf"
    """MLflow experiment of the runs."""
    registered_model: str = "kfp-rlhf"
    """Name of the registered model in MLflow."""

    @field_validator("experiment", "registered_model")
    @classmethod
    def _require_name(cls, value: str, info: ValidationInfo) -> str:
        is_model = info.field_name == "registered_model"
        limit = 256 if is_model else 500  # MLflow's
        bad = (
            next((c for c in "/:?" if c in value), "") if is_model else ""
        )  # they would end the name in models:/NAME@ALIAS
        if bad or not value.strip() or len(value) > limit or (is_model and value in (".", "..")):
            what = (
                f"it contains {bad}"
                if bad
                else "it is empty"
                if not value.strip()
                else f"MLflow refuses {value[:40]!r}"
            )
            raise ValueError(f"{what}; choose another name, of at most {limit} characters")
        return value

    @field_validator("ui_url")
    @classmethod
    def _require_web_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("write it as http(s)://HOST, the address at which people open MLflow")
        return value
