"""Converts rows to examples: the shapes of the common data sets. docs/data.md lists them, each with a row."""

from collections.abc import Iterator
from dataclasses import replace

from components.rlhf.data.answers import answer_of, first_answer, prompt_of, with_answers, with_system
from components.rlhf.data.examples import Answer, Example, Unusable
from components.rlhf.data.fields import Fields, nearest
from components.rlhf.data.messages import parse_messages, parse_tools
from components.rlhf.data.preferences import chosen_and_rejected, to_preferences
from components.rlhf.data.records import Conversation


def to_demonstrations(fields: Fields) -> Iterator[Example]:
    """One demonstration: a conversation with answers of the assistant, or a prompt with its completion."""
    if fields.get("label") is False:  # a number may be the label of something else
        raise Unusable("labelled as bad", is_defect=False)
    if fields.has("messages") and not fields.has("chosen"):
        messages = parse_messages(fields.get("messages"), "messages")
        tools = parse_tools(fields.get("tools"))
        first = first_answer(messages)
        if messages[-1].role != "assistant":
            raise Unusable("does not end with an answer", f"the last message has the role {messages[-1].role!r}.")
        conversation = Conversation(messages=with_system(fields, messages[:first]), tools=tools)
        yield Example(prompt=conversation, answers=(Answer(messages=messages[first:]),))
    elif fields.has("completion"):
        prompt, is_text = prompt_of(fields)
        yield with_answers(prompt, is_text, [answer_of(fields, "completion")])
    elif fields.has("chosen"):
        pair = next(chosen_and_rejected(fields))
        yield replace(pair, answers=pair.answers[:1], margin=None)
    else:
        raise fields.missing("completion" if fields.has("prompt") else "prompt", nearest(fields, "demonstrations"))


def to_prompts(fields: Fields) -> Iterator[Example]:
    """One prompt: a text, or the messages up to the answer that is to be given."""
    if fields.has("prompt") or fields.has("input"):
        prompt, is_text = prompt_of(fields)
    elif fields.has("messages"):
        messages = parse_messages(fields.get("messages"), "messages")
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if all(m.role == "system" for m in messages):
            raise Unusable("no message to answer", "messages contain no message that the assistant could answer.")
        tools = parse_tools(fields.get("tools"))
        prompt, is_text = Conversation(messages=with_system(fields, messages), tools=tools), False
    elif fields.has("chosen"):
        pair = next(chosen_and_rejected(fields))
        prompt, is_text = pair.prompt, pair.is_text
    else:
        raise fields.missing("prompt", nearest(fields, "prompts"))
    yield Example(prompt=prompt, is_text=is_text)


CONVERTERS = {"demonstrations": to_demonstrations, "preferences": to_preferences, "prompts": to_prompts}
