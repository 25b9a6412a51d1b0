"""Chat templates: rendering with a fixed date, and the token that closes a turn of the assistant."""

import contextlib
import datetime
import json
import re
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
    tools: str = "",
    date: datetime.date = DEFAULT_DATE,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as text. A template that asks for the current date gets the given one, the same on every day.

    tools is a JSON list of function schemas, or empty.
    """
    with _fixed_clock(date):
        return str(
            tokenizer.apply_chat_template(
                [_as_dict(message) for message in messages],
                tools=json.loads(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )


def marks_answers(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template marks the answers of the assistant with {% generation %}."""
    template = tokenizer.chat_template
    return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def marked_spans(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    tools: str = "",
    date: datetime.date = DEFAULT_DATE,
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the characters [start, end) that its template marks with {% generation %}."""
    with _fixed_clock(date):
        # The method of tokenizers that returns marks returns tokens, not characters.
        texts, spans = sys.modules["transformers.utils.chat_template_utils"].render_jinja_template(
            conversations=[[_as_dict(message) for message in messages]],
            tools=json.loads(tools) if tools else None,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]]


def _as_dict(message: Message) -> dict[str, Any]:
    """The message in the form that chat templates read."""
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        | ({"id": call.id} if call.id else {})
        for call in message.tool_calls
    ]
    optional = {
        "name": message.name,
        "reasoning_content": message.reasoning,
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id,
    }
    return {"role": message.role, "content": message.content} | {key: value for key, value in optional.items() if value}


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
