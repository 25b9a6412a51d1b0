"""Config of register: which branch of the gate it runs on."""

from typing import Literal

from components.rlhf.config.base import BaseConfig


class RegisterStageConfig(BaseConfig):
    decision: Literal["promote", "reject"]
