"""Converts rows to records: the accepted row formats, validated field by field.

prompt:                {"prompt": "..."}
prompt + completion:   {"prompt": "...", "completion": "..."}
messages:              {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
prompt + pair:         {"prompt": "...", "chosen": "...", "rejected": "...", "margin": 0.5}    (margin is optional)
"""

import datetime
import math
from typing import TYPE_CHECKING, Literal

from components.rlhf.data.chat import DEFAULT_DATE, render_chat, without_opening
from components.rlhf.data.records import Demonstration, Message, PreferencePair, Prompt
from components.rlhf.data.sources import Row
from components.rlhf.text.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["plain", "chat"]


def to_demonstration(
    location: str,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    date: datetime.date = DEFAULT_DATE,
) -> Demonstration:
    if "messages" in row:
        messages = _messages(location, row)
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise InputError(
                f"{location}: messages must end with a message of role 'assistant' after at least one other."
            )
        prompt, completion = _render(location, messages[:-1], tokenizer, date), messages[-1].content
    else:
        prompt, completion = _prompt(location, row, tokenizer, template, date), _text(location, row, "completion")
    return Demonstration(
        prompt=prompt.prompt, messages=prompt.messages, completion=_continuation(prompt, completion, tokenizer, date)
    )


def to_prompt(
    location: str,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    date: datetime.date = DEFAULT_DATE,
) -> Prompt:
    if "messages" in row:
        messages = _messages(location, row)
        if messages[-1].role == "assistant":  # a demonstration's conversation is a valid prompt without its answer
            messages = messages[:-1]
        if not messages:
            raise InputError(
                f"{location}: messages contain only an assistant message; add one of role 'user' before it."
            )
        return _render(location, messages, tokenizer, date)
    return _prompt(location, row, tokenizer, template, date)


def to_pair(
    location: str,
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    date: datetime.date = DEFAULT_DATE,
) -> PreferencePair:
    margin = row.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)
    ):
        raise InputError(f"{location}: margin is {margin!r}; it must be a finite number.")
    prompt = _prompt(location, row, tokenizer, template, date)
    return PreferencePair(
        prompt=prompt.prompt,
        messages=prompt.messages,
        chosen=_continuation(prompt, _text(location, row, "chosen"), tokenizer, date),
        rejected=_continuation(prompt, _text(location, row, "rejected"), tokenizer, date),
        margin=None if margin is None else float(margin),
    )


def _prompt(
    location: str, row: Row, tokenizer: "PreTrainedTokenizerBase", template: Template, date: datetime.date
) -> Prompt:
    prompt = _text(location, row, "prompt")
    if template == "plain" or not prompt.strip():
        return Prompt(prompt=prompt)
    return _render(location, [Message(role="user", content=prompt)], tokenizer, date)


def _continuation(prompt: Prompt, completion: str, tokenizer: "PreTrainedTokenizerBase", date: datetime.date) -> str:
    """The completion without what the generation prompt of the template has opened, such as <think>."""
    if not prompt.messages or without_opening(prompt.prompt, completion) == completion:
        return completion
    turns = render_chat(tokenizer, prompt.messages, date=date, add_generation_prompt=False)
    opening = prompt.prompt.removeprefix(turns) if prompt.prompt.startswith(turns) else ""
    return without_opening(opening, completion)


def _text(location: str, row: Row, name: str) -> str:
    if name not in row:
        raise InputError(
            f"{location} has no field {name!r} (found: {', '.join(row) or 'none'}); map it in columns or correct the data."
        )
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{location}: {name} has type {type(value).__name__}; it must be a string.")
    return value


def _messages(location: str, row: Row) -> list[Message]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{location}: messages must be a non-empty list of {{role, content}} objects.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{location}: message {number} must be an object with the strings role and content.")
    return [Message(role=message["role"], content=message["content"]) for message in messages]


def _render(
    location: str, messages: list[Message], tokenizer: "PreTrainedTokenizerBase", date: datetime.date
) -> Prompt:
    if not tokenizer.chat_template:
        raise InputError(
            f"{location}: a chat template is required, but the base model's tokenizer has none; use plain prompts."
        )
    try:
        return Prompt(prompt=render_chat(tokenizer, messages, date=date), messages=tuple(messages))
    except Exception as error:  # a template is a program and can raise any exception
        raise InputError(f"{location}: the model's chat template rejects these messages ({error}).") from error
