"""Settings of notify."""

from components.rlhf.config.base import BaseConfig


class NotifyStageConfig(BaseConfig):
    TEXTS = frozenset({"params"})

    preset: str
    ui_url: str | None = None
    params: str = ""
    """The params of the run as YAML, for its parent run in MLflow."""
