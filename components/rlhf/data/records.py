"""The record types that stages exchange and that a PPO iteration works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch may be missing: the data is also checked on the machine that submits a run
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A function that the assistant calls; arguments is a JSON object as text."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a conversation. role is system, user, assistant or tool."""

    role: str
    content: str
    name: str = ""  # of the speaker, or of the tool whose result this is
    reasoning: str = ""  # that precedes the content, as templates with reasoning_content write it
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""  # the call that this message answers
    is_learned: bool = True  # False for an answer that the source excludes from training


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in their order, and the functions that the assistant may call: a JSON list of schemas as text, or empty."""

    messages: tuple[Message, ...]
    tools: str = ""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An answer to be learned, without the token that ends it, after the text since the answer before it."""

    context: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Answers to be learned, in the order of one rendered conversation: context, answer, context, answer, ..."""

    turns: tuple[Turn, ...]
    conversation: Conversation | None = None  # that a chat template rendered, answers included; None for plain text

    @property
    def prompt(self) -> str:
        """The text before the first answer."""
        return self.turns[0].context


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two completions of one prompt, of which people preferred chosen. margin is the strength, in the data's own unit."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    conversation: Conversation | None = None  # that a chat template rendered as the prompt; None for plain text


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """One text with its rating, such as the mean of several people's."""

    prompt: str
    completion: str
    rating: float
    conversation: Conversation | None = None  # that a chat template rendered as the prompt; None for plain text


@dataclass(frozen=True, kw_only=True)
class LabeledText:
    """An answer that is desirable or not, without another one to compare it with."""

    prompt: str
    completion: str
    is_desirable: bool
    conversation: Conversation | None = None  # that a chat template rendered as the prompt; None for plain text


@dataclass(frozen=True, kw_only=True)
class Prompt:
    prompt: str
    id: str = ""  # identifies the prompt in reports; unique within its data set
    conversation: Conversation | None = None  # that a chat template rendered as the prompt; None for plain text
    columns: dict[str, str] = field(default_factory=dict, hash=False)  # of the source, such as answer (DataSource.keep)


def is_chat(record: Demonstration | PreferencePair | RatedText | LabeledText | Prompt) -> bool:
    """Whether a chat template rendered the text, with all special tokens that it needs."""
    return record.conversation is not None


@dataclass(frozen=True, kw_only=True)
class ResponseTurn:
    """What the model or the environment says in a response of several turns: the tokens [start, stop) of the response, and their text."""

    speaker: Literal["model", "environment"]
    start: int
    stop: int
    text: str  # of the environment: its observation; of the model: with the stop string that ends the turn, except for the last turn


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response with its token ids, so that text is never tokenized again.

    A response of several turns (components/rlhf/environments) has the tokens of the environment among those of the model.
    """

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]  # includes the stop token if the model generated one
    response: str  # decoded text, without special tokens, to the stop string if there is one
    logprobs: (
        Tensor | None
    )  # [T] fp32, from the rollout engine; None for human-written texts; 0 at tokens of the environment
    truncated: bool  # reached max_new_tokens without a stop token or a stop string
    weight_version: int = 0  # number of weight syncs of the rollout engine before it sampled this
    baseline: float = 0.0  # reward of the greedy response to the same prompt (ReMax)
    response_mask: Sequence[bool] | None = None  # [T], False at tokens of the environment; None: all are the model's
    turns: tuple[ResponseTurn, ...] = ()  # in their order; empty for a response of a single turn
    environment_reward: float | None = None  # sum of the rewards of all steps; None without an environment
    failure: str = ""  # why the environment failed, as part of a sentence; such a response is not learned from

    @property
    def model_runs(self) -> list[list[int]]:
        """The ids of the model, in runs between which the environment speaks."""
        if self.response_mask is None:
            return [list(self.response_ids)]
        runs = groupby(zip(self.response_ids, self.response_mask, strict=True), key=itemgetter(1))
        return [[token for token, _ in run] for is_model, run in runs if is_model]

    @property
    def num_model_tokens(self) -> int:
        return len(self.response_ids) if self.response_mask is None else sum(self.response_mask)

    @property
    def answer(self) -> str:
        """The text of the model's last turn, which answers the prompt."""
        return self.turns[-1].text if self.turns else self.response


@dataclass(frozen=True, kw_only=True)
class ValidationSample:
    """One response to a validation prompt during PPO, from which evaluation scores the course of training with the judge."""

    iteration: int  # 0: before the first update
    num_rollouts: int  # number of responses trained on so far
    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]
    response: str
    truncated: bool
    score: float  # weighted sum of the scores of all rewards
    kl: float  # log-ratio to the reference in nats, summed over the tokens of the model
    response_mask: Sequence[bool] | None = None  # as in Completion, like the next three
    turns: tuple[ResponseTurn, ...] = ()
    environment_reward: float | None = None
    failure: str = ""
