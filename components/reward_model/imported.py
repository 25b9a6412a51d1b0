"""A reward model that was trained elsewhere: how it reads responses, its accuracy and the scale of its scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from components.reward_model.evaluate import RewardModelResult, calibrate_and_measure
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.data.records import is_chat
from components.rlhf.data.tokenizer import load_tokenizer, same_ids
from components.rlhf.engine.factory import frozen_weights, prepare_frozen_model, weight_shards
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.engine.protocol import Group
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.precision import compute_dtype, default_device
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import InputError

ScoredAs = Literal["ids", "text"]


def measure_imported(
    folder: Path,
    config: RewardModelStageConfig,
    sft_model: Path,
    texts: dict[str, Any],
    log: Callable[[str], None],
    group: Group = SINGLE_PROCESS,
) -> RewardModelResult:
    """Load an imported reward model and measure it. texts are the pairs, responses and max_tokens of calibrate_and_measure.

    Under ZeRO-3 it is sharded over the ranks, as a trained one is.
    """
    tokenizer, own = load_tokenizer(sft_model), load_tokenizer(folder)
    way = scored_as(own, tokenizer, has_chats=any(map(is_chat, texts["pairs"])))
    log("the reward model reads " + ("the SFT model's token ids" if way == "ids" else "text, with its own tokenizer"))
    dtype, training = compute_dtype(config.model.precision), config.reward_model.training
    shard = weight_shards(training, group=group, dtype=dtype)
    lm = load_scalar_lm(folder, num_frozen_layers=0, dtype=dtype, trainable=False, device=default_device(), shard=shard)
    lm.config.scored_as = way
    model = ScalarModel(lm, num_frozen_layers=0, dtype=dtype)
    prepare_frozen_model(model, training, group=group, dtype=dtype)
    text_tokenizer = own if way == "text" else None
    numbers, margins = calibrate_and_measure(
        model, training, tokenizer, **texts, group=group, text_tokenizer=text_tokenizer
    )
    return RewardModelResult(
        model=model,
        tokenizer=text_tokenizer or tokenizer,
        weights=frozen_weights(model, training),
        numbers=numbers,
        facts={"scored_as": way},
        margins=margins,
    )


def scored_as(own: PreTrainedTokenizerBase, actors: PreTrainedTokenizerBase, *, has_chats: bool) -> ScoredAs:
    """ids if both tokenizers give every text the same ids; else text, for its own chat template and tokenizer.

    Raises InputError if there are chats and it has no template for them.
    """
    if same_ids(own, actors):
        return "ids"
    if has_chats and not own.chat_template:
        raise InputError(
            "The reward model has another tokenizer than the SFT model and no chat template, so it cannot read conversations; "
            "add its chat template to the model folder, or set data.template to plain."
        )
    return "text"
