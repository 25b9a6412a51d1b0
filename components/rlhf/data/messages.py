"""Parses lists of messages: OpenAI's and ShareGPT's keys, parts of content, tool calls, and Human/Assistant transcripts."""

import json
import re
from collections.abc import Mapping
from typing import Any

from components.rlhf.data.examples import Unusable
from components.rlhf.data.records import Message, ToolCall
from components.rlhf.text.strict_json import NotJsonError, parse_json

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "ai": "assistant", "function_call": "assistant", "developer": "system", "function": "tool", "observation": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


def parse_messages(value: Any, field: str) -> tuple[Message, ...]:
    """The messages of a list of {role, content} or {from, value} objects, or of its JSON text. Raises Unusable.

    Names of roles are translated to system, user, assistant and tool; empty system messages are left out.
    """
    value = _decoded(value, field)
    if isinstance(value, Mapping):  # a single message
        value = [value]
    if not isinstance(value, list) or not value:
        raise Unusable(
            f"{field} is not a list of messages",
            f"{field} must be a non-empty list of {{role, content}} objects.",
        )
    messages = [_parse_message(number, message, field) for number, message in enumerate(value, start=1)]
    kept = tuple(m for m in messages if m.role != "system" or m.content.strip())
    if not kept:
        raise Unusable("a message is empty", f"{field} has only an empty system message.")
    return kept


def _parse_message(number: int, message: Any, field: str) -> Message:
    where = f"message {number} of {field}"
    if not isinstance(message, Mapping):
        raise Unusable("a message is not an object", f"{where} must be an object with role and content.")
    role = _first(message, "role", "from")
    if not isinstance(role, str) or not role:
        raise Unusable("a message has no role", f"{where} has no role.")
    source_role, role = role, ROLES.get(role.lower(), role)
    content, reasoning = _parse_content(_first(message, "content", "value"), where)
    calls = _parse_tool_calls(message, where)
    if source_role == "function_call" and not calls:
        calls, content = (_parse_call(_decoded(content, where), where),), ""
    if not content.strip() and not calls and role != "system":
        raise Unusable("a message is empty", f"{where} has no content.")
    return Message(
        role=role,
        content=content,
        name=str(_first(message, "name") or ""),
        reasoning=str(_first(message, "reasoning_content", "reasoning", "thinking") or reasoning),
        tool_calls=calls,
        tool_call_id=str(_first(message, "tool_call_id") or ""),
        is_learned=_first(message, "weight", "train") not in (0, False),
    )


def _parse_content(content: Any, where: str) -> tuple[str, str]:
    """The text of a content and of its reasoning: a string, null, or a list of parts."""
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise Unusable(
            "the content of a message is not text", f"{where} has a content of type {type(content).__name__}."
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part if isinstance(part, str) else part.get(kind) if isinstance(part, Mapping) else None
        if kind not in ("text", "thinking") or not isinstance(text, str):
            raise Unusable(
                "the content of a message is not text",
                f"{where} has a part of type {str(kind)[:40]!r}; only text can be used.",
            )
        (texts if kind == "text" else thoughts).append(text)
    return "".join(texts), "".join(thoughts)


def _parse_tool_calls(message: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    calls = _decoded(_first(message, "tool_calls"), where) or []
    old = _first(message, "function_call")  # OpenAI's form before tool_calls
    if not isinstance(calls, list):
        raise Unusable("tool calls cannot be read", f"{where} has tool_calls that are not a list.")
    return tuple(_parse_call(call, where) for call in [*calls, *([old] if old else [])])


def _parse_call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise Unusable("tool calls cannot be read", f"{where} has a tool call without the name of a function.")
    arguments = _decoded(function.get("arguments", function.get("parameters")), where)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise Unusable("tool calls cannot be read", f"{where} has a tool call whose arguments are not an object.")
    identifier = call.get("id")
    return ToolCall(
        name=name,
        arguments=json.dumps(without_nulls(arguments or {}), ensure_ascii=False),
        id=identifier if isinstance(identifier, str) else "",
    )


def parse_tools(value: Any) -> str:
    """The functions that the assistant may call, as a JSON list of schemas; empty for none. Raises Unusable."""
    tools = _decoded(value, "tools")
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("tools cannot be read", "tools must be a list of function schemas.")
    return json.dumps([without_nulls(tool) for tool in tools], ensure_ascii=False)


def without_nulls(value: Any) -> Any:
    """Without the keys that are null at any depth: Arrow gives every object of a column the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The messages of a text in the form `\\n\\nHuman: ...\\n\\nAssistant: ...`; empty for any other text.

    An Assistant turn without text at the end opens the next answer and is left out.
    """
    starts = list(TURN.finditer(text.lstrip()))
    if len(starts) < 2 or starts[0].start() != 0 or starts[0][1] != "Human":
        return ()
    text, messages = text.lstrip(), []
    for turn, following in zip(starts, [*starts[1:], None], strict=True):
        content = text[turn.end() : following.start() if following else len(text)].strip()
        if content:
            messages.append(Message(role="user" if turn[1] == "Human" else "assistant", content=content))
    return tuple(messages)


def _decoded(value: Any, where: str) -> Any:
    """The value, or if it is the JSON text of a list or an object, what it says."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value)
    except NotJsonError as error:
        raise Unusable("a text is not the JSON that it should be", f"{where} is not JSON ({error}).") from None


def _first(message: Mapping[str, Any], *keys: str) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)
