"""Verifies that a rollout engine has the trainer's weights: both compute the log-probs of a fixed text after every sync."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.data.tokenizer import encode_prompt
from components.rlhf.text.errors import InputError

# The log-probs of this text depend on every weight except the embeddings of other tokens.
PROBE_TEXT = "In 1969 the quick brown fox, 38 years old, said: 'What a film!' Then it left."
PROBE_TOKENS = 64


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the fixed text, at most PROBE_TOKENS of them."""
    return encode_prompt(tokenizer, PROBE_TEXT)[:PROBE_TOKENS]


def check_sync(engine_logprobs: Tensor, trainer_logprobs: Tensor, *, tolerance: float, version: int) -> None:
    """Raise InputError if a log-prob differs by more than tolerance (nats). Both are [T], of the same ids, at temperature 1."""
    if engine_logprobs.shape != trainer_logprobs.shape:
        raise ValueError(
            f"log-probs of the engine have shape {engine_logprobs.shape}, of the trainer {trainer_logprobs.shape}"
        )
    gap = (engine_logprobs.double().cpu() - trainer_logprobs.double().cpu()).abs().max().item()
    if not gap <= tolerance:  # also fails for nan
        raise InputError(
            f"The rollout engine's weights (version {version}) do not match the trainer's: log-probs of the probe differ by "
            f"{gap:.3g} nats, more than {tolerance:.3g}; resume from the last checkpoint, or set ppo.rollout.engine to hf."
        )
