"""Prompts and answers of rows: texts or messages, with system prompt, input, history and tools."""

from collections.abc import Mapping
from dataclasses import replace

from components.rlhf.data.examples import Answer, Example, Unusable, as_text
from components.rlhf.data.fields import Fields
from components.rlhf.data.messages import parse_messages, parse_tools
from components.rlhf.data.records import Conversation, Message

REPEATED_PROMPT = "prompt repeated in its answers"
MIN_REPEATED = 12  # characters


def prompt_of(fields: Fields) -> tuple[Conversation, bool]:
    """The prompt of a row, and whether it is a plain text."""
    tools = parse_tools(fields.get("tools"))
    value, has_input = fields.get("prompt"), fields.has("input")
    if value is None and not has_input:
        raise fields.missing("prompt")
    if value is None:
        value, has_input = fields.get("input"), False
    if isinstance(value, list | Mapping):
        messages = parse_messages(value, "prompt")
        return Conversation(messages=with_system(fields, messages), tools=tools), False
    if not isinstance(value, str):
        raise Unusable(
            "prompt is not text", f"prompt has type {type(value).__name__}; it must be a string or messages."
        )
    if not value.strip():
        raise Unusable("empty text", "prompt is empty.")
    if has_input and isinstance(more := fields.get("input"), str) and more.strip():
        value = f"{value}\n\n{more}"
    history = _history(fields)
    messages = with_system(fields, (*history, *as_text(value)))
    return Conversation(messages=messages, tools=tools), len(messages) == 1 and not tools


def _history(fields: Fields) -> tuple[Message, ...]:
    """Earlier turns as pairs of question and answer."""
    history = fields.get("history")
    if not history or isinstance(history, str):
        return ()
    if not isinstance(history, list) or not all(
        isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in history
    ):
        raise Unusable("history is not pairs of texts", "history must be a list of [question, answer] pairs.")
    return tuple(m for question, answer in history for m in (*as_text(question), *as_text(answer, "assistant")))


def with_system(fields: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the row's own system prompt, if it has one and they have none."""
    system = fields.get("system")
    if not isinstance(system, str) or not system.strip() or any(m.role == "system" for m in messages):
        return messages
    return (*as_text(system, "system"), *messages)


def answer_of(fields: Fields, field: str, rating: float | None = None) -> Answer:
    value = fields.get(field)
    if isinstance(value, list | Mapping):
        return Answer(messages=parse_messages(value, field), rating=rating)
    text = fields.text(field)
    if not text.strip():
        raise Unusable("empty text", f"{field} is empty.")
    return Answer(messages=as_text(text, "assistant"), rating=rating)


def with_answers(prompt: Conversation, is_text: bool, answers: list[Answer], margin: float | None = None) -> Example:
    """The example, with answers that do not repeat its prompt. Raises Unusable for an answer that is none."""
    changed = ""
    is_text = is_text and all(len(answer.messages) == 1 and not answer.messages[0].tool_calls for answer in answers)
    # A single answer may repeat the question on purpose; two answers that both begin with it are whole texts.
    if all(_repeats(answer, prompt) and (len(answers) == 2 or len(answer.messages) > 1) for answer in answers):
        answers = [_without_prompt(answer, prompt) for answer in answers]
        changed = REPEATED_PROMPT
    if any(
        not answer.messages or not any(m.content.strip() or m.tool_calls for m in answer.messages) for answer in answers
    ):
        raise Unusable("empty text", "an answer is empty after the prompt.")
    if any(answer.messages[0].role != "assistant" for answer in answers):
        raise Unusable("does not begin with an answer", "an answer begins with a message that is not the assistant's.")
    if any(answer.messages[-1].role != "assistant" for answer in answers):
        raise Unusable("does not end with an answer", "an answer ends with a message that is not the assistant's.")
    return Example(prompt=prompt, answers=tuple(answers), margin=margin, is_text=is_text, changed=changed)


def _repeats(answer: Answer, prompt: Conversation) -> bool:
    """Whether an answer begins with the prompt: with its messages, or as a text with its text.

    A text that is shorter than MIN_REPEATED may begin an answer by chance.
    """
    if len(answer.messages) > 1:
        own = tuple(m for m in prompt.messages if m.role != "system")
        start = tuple(m for m in answer.messages if m.role != "system")[: len(own)]
        return [(m.role, m.content) for m in start] == [(m.role, m.content) for m in own]
    text = prompt.messages[0].content
    return len(prompt.messages) == 1 and len(text) >= MIN_REPEATED and answer.messages[0].content.startswith(text)


def _without_prompt(answer: Answer, prompt: Conversation) -> Answer:
    if len(answer.messages) > 1:
        own = [m for m in prompt.messages if m.role != "system"]
        return replace(answer, messages=tuple(m for m in answer.messages if m.role != "system")[len(own) :])
    text = answer.messages[0].content.removeprefix(prompt.messages[0].content)
    return replace(answer, messages=as_text(text, "assistant"))


def first_answer(messages: tuple[Message, ...]) -> int:
    """Index of the first message of the assistant after a message of somebody else."""
    for index, message in enumerate(messages):
        if message.role == "assistant" and any(m.role not in ("system", "assistant") for m in messages[:index]):
            return index
    raise Unusable("no answer to learn", "messages have no message of the assistant after one of the user.")
