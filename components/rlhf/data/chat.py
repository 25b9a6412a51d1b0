"""Chat templates: rendering with a fixed date, and the token that closes a turn of the assistant."""

import contextlib
import datetime
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from components.rlhf.data.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_DATE = datetime.date(2025, 1, 1)
ANSWER = "answer"


def render_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    date: datetime.date = DEFAULT_DATE,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as text. A template that asks for the current date gets the given one, the same on every day."""
    with _fixed_clock(date):
        return str(
            tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )


@contextlib.contextmanager
def _fixed_clock(date: datetime.date) -> Iterator[None]:
    """Let strftime_now, which transformers gives to templates and takes from nobody, read this date."""
    # A tokenizer of transformers has imported it; the submitting machine may have no transformers.
    module: Any = sys.modules.get("transformers.utils.chat_template_utils")

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Self:
            return cls(date.year, date.month, date.day, tzinfo=tz)

    if module is None:
        yield
        return
    original, module.datetime = module.datetime, Clock
    try:
        yield
    finally:
        module.datetime = original


def turn_end_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token with which the chat template closes a turn of the assistant, or None if it closes it with none of its own.

    It is the first added token (such as <|im_end|>, <end_of_turn> or <|eot_id|>) after the text of the turn.
    """
    if not tokenizer.chat_template:
        return None
    conversation = [Message(role="user", content="question"), Message(role="assistant", content=ANSWER)]
    try:
        text = render_chat(tokenizer, conversation, add_generation_prompt=False)
    except Exception:  # a template is a program and can raise any exception, for example without a system message
        return None
    ids = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    return next((int(i) for i in ids if i in tokenizer.added_tokens_decoder), None)


def without_opening(prompt: str, completion: str) -> str:
    """The completion without what the rendered prompt already ends with, such as <think> or the header of the turn."""
    opened, text = prompt.rstrip(), completion.lstrip()
    for start in range(max(len(opened) - 80, 0), len(opened)):
        if opened[start] in "<[" and text.startswith(opened[start:]):
            rest = text[len(opened) - start :]
            return rest.removeprefix(prompt[len(opened) :])
    return completion
