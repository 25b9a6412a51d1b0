"""The record types that stages exchange and that a PPO iteration works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
class Completion:
    """One sampled response with its token ids, so that text is never tokenized again."""

    prompt: Prompt
    prompt_ids: list[int]
    response_ids: list[int]  # includes the stop token if the model generated one
    response: str  # decoded text, without special tokens, to the stop string if there is one
    logprobs: Tensor | None  # [T] fp32, from the rollout engine; None for human-written texts
    truncated: bool  # reached max_new_tokens without a stop token or a stop string
    weight_version: int = 0  # number of weight syncs of the rollout engine before it sampled this
    baseline: float = 0.0  # reward of the greedy response to the same prompt (ReMax)


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
    kl: float  # log-ratio to the reference in nats, summed over the response
