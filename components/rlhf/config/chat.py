"""Settings of `kfp-rlhf chat`."""

from typing import Annotated

from pydantic import Field

from components.rlhf.config.base import BaseConfig
from components.rlhf.config.model import Precision, SamplingConfig, Seed


class ChatModel(BaseConfig):
    """A model that answers."""

    name: str
    """Name over its answers."""
    folder: str
    """Model folder."""


class ChatConfig(BaseConfig):
    """Models that answer the same prompts side by side."""

    models: Annotated[tuple[ChatModel, ...], Field(min_length=1)]
    """The models, in the order of their columns."""
    reward_model: str | None = None
    """Folder of a reward model that scores the answers while they are written."""
    prompts: str | None = None
    """Folder of held-out prompts, one of which an empty line takes."""
    is_chat: bool | None = None
    """Whether the chat template renders the messages, or each line is a text to continue; null as for the held-out prompts."""
    sampling: SamplingConfig = SamplingConfig()
    """How the models sample."""
    greedy: bool = False
    """Take the most probable token in every step."""
    precision: Precision = "auto"
    """Precision in which the models compute."""
    seed: Seed = 0
    """Random seed of the first answers; each message has the next one."""
