"""Settings of where things lie: checkpoints, S3, tracking."""

from pydantic import field_validator

from components.rlhf.config.base import BaseConfig, NonNegative, PositiveInt


class CheckpointConfig(BaseConfig):
    """How often a training stage saves what it needs to go on after a death."""

    every_minutes: NonNegative = 5.0
    """Minutes between checkpoints: the most work that can be lost."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""


class StorageConfig(BaseConfig):
    """Where a run keeps what is not an artifact, and how S3 is reached. Credentials come from the environment, never from here."""

    checkpoint_uri: str | None = None
    """Folder or s3://BUCKET/PREFIX for checkpoints; null is the run's own folder on this machine, and none on a cluster."""
    uri: str | None = None
    """s3://BUCKET/PREFIX or folder that local files of a submitted run are copied to."""
    publish_uri: str | None = None
    """s3://BUCKET/PREFIX or folder that trained models are written to, under run id and stage; null publishes nothing."""
    endpoint_url: str | None = None
    """S3 server that is not AWS: http(s)://HOST:PORT."""
    region: str | None = None
    """Region of the buckets; null leaves it to AWS_REGION."""
    path_style: bool | None = None
    """Bucket in the path instead of the host name; null is true where there is an endpoint_url."""
    ca_bundle: str | None = None
    """PEM file of the CA that signed the server's certificate."""
    anonymous: bool = False
    """true sends no credentials: public buckets."""
    retry_minutes: NonNegative = 10.0
    """Minutes that a call which fails is tried again before the stage fails."""

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("write it as http://HOST:PORT or https://HOST:PORT")
        return value

    @field_validator("checkpoint_uri", "uri", "publish_uri")
    @classmethod
    def _store(cls, value: str | None) -> str | None:
        scheme, found, rest = (value or "").partition("://")
        if found and (scheme not in ("s3", "file") or not rest.strip("/")):
            raise ValueError("write s3://BUCKET/PREFIX or a folder")
        return value


class TrackingConfig(BaseConfig):
    """MLflow."""

    enabled: bool = True
    """false logs nothing."""
    uri: str | None = None
    """MLflow tracking URI; null is a sqlite file beside the run, on this machine."""
    experiment: str = "kfp-rlhf"
    """Experiment that runs are filed under."""
    registered_model: str = "kfp-rlhf"
    """Name in the model registry."""
