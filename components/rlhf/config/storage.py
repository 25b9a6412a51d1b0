"""Settings of checkpoints, storage and experiment tracking."""

from pydantic import field_validator

from components.rlhf.config.base import BaseConfig, NonNegative, PositiveInt


class CheckpointConfig(BaseConfig):
    """How often a training stage saves a checkpoint to resume from."""

    every_minutes: NonNegative = 5.0
    """Minutes between checkpoints; a crash loses at most this much work, plus the time to write one."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""


class StorageConfig(BaseConfig):
    """Location of checkpoints and published models, and access to S3. Credentials come from the environment."""

    checkpoint_uri: str | None = None
    """Folder or s3://BUCKET/PREFIX for checkpoints; null is the run directory in local runs, cluster.checkpoint_claim on a cluster."""
    uri: str | None = None
    """Folder or s3://BUCKET/PREFIX that local files of a submitted run are uploaded to."""
    publish_uri: str | None = None
    """Folder or s3://BUCKET/PREFIX that trained models are published to, as RUN_ID/STAGE/model; null publishes nothing."""
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

    @field_validator("checkpoint_uri", "uri", "publish_uri")
    @classmethod
    def _require_store_uri(cls, value: str | None) -> str | None:
        scheme, separator, rest = (value or "").partition("://")
        if separator and (scheme not in ("s3", "file") or not rest.strip("/")):
            raise ValueError("write s3://BUCKET/PREFIX or a folder")
        return value


class TrackingConfig(BaseConfig):
    """Experiment tracking in MLflow."""

    enabled: bool = True
    """Log to MLflow."""
    uri: str | None = None
    """MLflow tracking URI; null is mlflow.db in the run directory (with --out) or next to it, and MLFLOW_TRACKING_URI on a cluster."""
    experiment: str = "kfp-rlhf"
    """MLflow experiment of the runs."""
    registered_model: str = "kfp-rlhf"
    """Name of the registered model in MLflow."""
