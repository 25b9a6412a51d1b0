"""The form that every source is converted to: a conversation, and what is to be learned of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from components.rlhf.data.records import Conversation, Message


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer to a conversation: one message of the assistant, or more if the conversation goes on after it."""

    messages: tuple[Message, ...]
    rating: float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record of a source.

    A prompt has no answer, a demonstration one, a rated text one with its rating, and a pair two, the better one first.
    """

    prompt: Conversation
    answers: tuple[Answer, ...] = ()
    margin: float | None = None  # of a pair: the strength of the preference, in the data's own unit
    is_text: bool = False  # a plain text in one message, which can be used without a chat template
    columns: Mapping[str, str] = field(default_factory=dict)  # of the source, that a prompt keeps
    changed: str = ""  # what was changed while reading, as one of a few fixed phrases


class Unusable(Exception):
    """A record that is not used. reason is one of a few phrases to count by; detail is a sentence about this record."""

    def __init__(self, reason: str, detail: str = "", *, is_defect: bool = True) -> None:
        """A record without defect is merely not needed, such as a tie, and does not make its source suspicious."""
        super().__init__(detail or reason)
        self.reason = reason
        self.is_defect = is_defect


def as_text(text: str, role: str = "user") -> tuple[Message, ...]:
    """A plain text as the only message of a conversation or an answer."""
    return (Message(role=role, content=text),)
