"""Config of notify: what its message says about the run."""

from components.rlhf.config.base import BaseConfig


class NotifyStageConfig(BaseConfig):
    """What the exit handler tells people about the run."""

    preset: str
    ui_url: str | None = None
