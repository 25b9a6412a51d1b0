"""Settings of register: the branch of the gate that it runs on."""

from typing import Literal

from components.rlhf.config.base import BaseConfig


class RegisterStageConfig(BaseConfig):
    decision: Literal["promote", "reject"]
