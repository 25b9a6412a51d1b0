"""Proof that a rollout engine samples from the trainer's weights: both score the same fixed ids after every sync."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.data.tokenizer import encode_prompt
from components.rlhf.text.errors import InputError

# Words of many kinds: every weight but the embeddings of other tokens has a part in their log-probs.
PROBE_TEXT = "In 1969 the quick brown fox, 38 years old, said: 'What a film!' Then it left."


PROBE_TOKENS = 64


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids to score: those of a fixed text, at the most PROBE_TOKENS of them."""
    return encode_prompt(tokenizer, PROBE_TEXT)[:PROBE_TOKENS]


def check_sync(engine_logprobs: Tensor, trainer_logprobs: Tensor, *, tolerance: float, version: int) -> None:
    """Raise InputError when a log-prob differs by more than tolerance (nats). Both [T], of the same ids, at temperature 1."""
    if engine_logprobs.shape != trainer_logprobs.shape:
        raise ValueError(f"the engine scored {engine_logprobs.shape}, the trainer {trainer_logprobs.shape}")
    gap = (engine_logprobs.double().cpu() - trainer_logprobs.double().cpu()).abs().max().item()
    if not gap <= tolerance:  # nan is no agreement
        raise InputError(
            f"The sync of version {version} did not take: log-probs of the probe differ by {gap:.3g} between the rollout engine "
            f"and the trainer, more than {tolerance:.3g}; resume from the last checkpoint, or set ppo.rollout.engine to hf."
        )
