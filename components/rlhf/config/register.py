"""Settings of register: the branch of the gate that it runs on, and whether it waits for a person."""

from typing import Literal

from components.rlhf.config.base import BaseConfig, Positive


class ApprovalConfig(BaseConfig):
    """How a person is asked for approval."""

    hours: Positive
    """Time limit, in hours since the first request."""
    preset: str = ""
    """Label of the run in messages."""
    ui_url: str | None = None
    """Address of Kubeflow Pipelines' UI, for links in messages."""


class RegisterStageConfig(BaseConfig):
    decision: Literal["promote", "reject"]
    approval: ApprovalConfig | None = None
    """Set where only a person can promote."""
