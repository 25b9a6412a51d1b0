"""From rows to records: the accepted forms of data, checked field by field.

prompt:                {"prompt": "..."}
prompt + completion:   {"prompt": "...", "completion": "..."}
messages:              {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
prompt + pair:         {"prompt": "...", "chosen": "...", "rejected": "...", "margin": 0.5}    (margin is optional)
"""

import math
from typing import TYPE_CHECKING, Literal

from components.rlhf.data.records import Demonstration, PreferencePair, Prompt
from components.rlhf.data.sources import Row
from components.rlhf.text.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["plain", "chat"]
Message = dict[str, str]


def to_demonstration(place: str, row: Row, tokenizer: "PreTrainedTokenizerBase", template: Template) -> Demonstration:
    if "messages" in row:
        messages = _messages(place, row)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError(f"{place}: messages must end with one of role 'assistant' after at least one other.")
        return Demonstration(prompt=_render(place, messages[:-1], tokenizer), completion=messages[-1]["content"])
    return Demonstration(prompt=_prompt(place, row, tokenizer, template), completion=_text(place, row, "completion"))


def to_prompt(place: str, row: Row, tokenizer: "PreTrainedTokenizerBase", template: Template) -> Prompt:
    if "messages" in row:
        messages = _messages(place, row)
        if messages[-1]["role"] == "assistant":  # a demonstration's conversation serves as a prompt, too
            messages = messages[:-1]
        if not messages:
            raise InputError(f"{place}: messages hold no question; a message of role 'user' is needed.")
        return Prompt(prompt=_render(place, messages, tokenizer))
    return Prompt(prompt=_prompt(place, row, tokenizer, template))


def to_pair(place: str, row: Row, tokenizer: "PreTrainedTokenizerBase", template: Template) -> PreferencePair:
    margin = row.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)
    ):
        raise InputError(f"{place}: margin is {margin!r}; it must be a finite number.")
    return PreferencePair(
        prompt=_prompt(place, row, tokenizer, template),
        chosen=_text(place, row, "chosen"),
        rejected=_text(place, row, "rejected"),
        margin=None if margin is None else float(margin),
    )


def _prompt(place: str, row: Row, tokenizer: "PreTrainedTokenizerBase", template: Template) -> str:
    prompt = _text(place, row, "prompt")
    if template == "plain" or not prompt.strip():
        return prompt
    return _render(place, [{"role": "user", "content": prompt}], tokenizer)


def _text(place: str, row: Row, name: str) -> str:
    if name not in row:
        raise InputError(
            f"{place} has no field {name!r} (fields there: {', '.join(row) or 'none'}); name it in columns or correct the data."
        )
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: {name} is a {type(value).__name__}; it must be text.")
    return value


def _messages(place: str, row: Row) -> list[Message]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: messages must be a list of {{role, content}} objects with at least one.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{place}: message {number} must be an object with the texts role and content.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _render(place: str, messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{place}: this needs a chat template, and the base model's tokenizer has none; use plain prompts."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs and raise what they like
        raise InputError(f"{place}: the model's chat template refuses these messages ({error}).") from error
