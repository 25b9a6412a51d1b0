"""Settings of where things lie: checkpoints, tracking, images."""

from components.rlhf.config.base import NonNegative, PositiveInt, Settings


class CheckpointSettings(Settings):
    """How often a training stage saves what it needs to go on after a death."""

    every_minutes: NonNegative = 5.0
    """Minutes between checkpoints: the most work that can be lost."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""


class StorageSettings(Settings):
    """Where a run keeps what is not an artifact."""

    checkpoint_uri: str | None = None
    """Folder for checkpoints; null is the run's own folder on this machine, and none on a cluster."""


class TrackingSettings(Settings):
    """MLflow."""

    enabled: bool = True
    """false logs nothing."""
    uri: str | None = None
    """MLflow tracking URI; null is a sqlite file beside the run, on this machine."""
    experiment: str = "kfp-rlhf"
    """Experiment that runs are filed under."""
    registered_model: str = "kfp-rlhf"
    """Name in the model registry."""


class ClusterSettings(Settings):
    """What a cluster needs to know."""

    image: str = "kfp-rlhf/trainer:0.1.0"
    """Image that every stage runs in."""
