"""The record types that travel between stages and through a PPO iteration.

Law of this room: record types, readers, chat templates, tokenisation and batching; no models, no losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records are read where torch is not installed, too: data is checked before a run is submitted
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two completions of one prompt; people preferred the first. margin says by how much, in the data's own unit."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """One text with the mean of its human ratings."""

    prompt: str
    completion: str
    rating: float


@dataclass(frozen=True, kw_only=True)
class Prompt:
    prompt: str
    id: str = ""  # names the prompt in reports; unique within its data set


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response with everything later steps need, as ids: text is never tokenised again."""

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]  # includes the stop token that the model produced, if it did
    response: str  # the text, without special tokens
    logprobs: Tensor | None  # [T] of the engine that sampled, fp32; None for texts that people wrote
    truncated: bool  # reached max_new_tokens without a stop token
    weight_version: int = 0  # how many syncs the engine that sampled had seen


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """One response that a policy in training gave to a validation prompt, so that others can judge how training went."""

    iteration: int  # 0 is before the first update
    num_rollouts: int  # responses that were trained on until then
    prompt: str
    response: str
    num_tokens: int
    truncated: bool
    score: float  # the reward model's, as PPO sees it
    kl: float  # log-ratio to the reference, summed over the response: nats
