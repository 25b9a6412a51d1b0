"""A reward model that was trained elsewhere: how it reads responses."""

from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from components.rlhf.config.model import ModelConfig
from components.rlhf.data.tokenizer import same_ids
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import InputError

ScoredAs = Literal["ids", "text"]


def scored_as(own: PreTrainedTokenizerBase, actors: PreTrainedTokenizerBase, *, is_chat: bool) -> ScoredAs:
    """ids if both tokenizers give every text the same ids; else text, which its own chat template and tokenizer encode.

    Raises InputError for chats that it has no template for.
    """
    if same_ids(own, actors):
        return "ids"
    if is_chat and not own.chat_template:
        raise InputError(
            "The reward model has another tokenizer than the SFT model and no chat template, so it cannot read conversations; "
            "add its chat template to the model folder, or set data.template to plain."
        )
    return "text"


def load_imported(folder: Path, config: ModelConfig, way: ScoredAs) -> ScalarModel:
    """The imported model, frozen. Its config says how it reads responses."""
    dtype = compute_dtype(config.precision)
    lm = load_scalar_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False).to(default_device())
    lm.config.scored_as = way
    return ScalarModel(lm, num_frozen_layers=0, dtype=dtype)
