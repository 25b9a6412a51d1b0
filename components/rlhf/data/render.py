"""Renders examples to the records that stages read: as plain text, or with the model's chat template.

Sources, stages and the judge share this code, so that a prompt is the same text everywhere.
"""

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from components.rlhf.data.chat import marked_spans, marks_answers, render_chat, without_opening
from components.rlhf.data.examples import Answer, Example, Unusable
from components.rlhf.data.messages import parse_transcript
from components.rlhf.data.records import Conversation, Demonstration, PreferencePair, Prompt, RatedText, Turn
from components.rlhf.data.tokenizer import response_end_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "split into one record per answer, because the chat template rewrites earlier turns"
ROLES = ("system", "user", "assistant")
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Renders all examples of a run alike: with the chat template of the tokenizer if is_chat, else as plain texts.

    Raises Unusable for an example that the template rejects, or of which it leaves out a message or a tool call.
    """

    tokenizer: "PreTrainedTokenizerBase"
    is_chat: bool
    date: datetime.date
    assistant_turns: Literal["all", "last"] = "all"

    def prompt(self, example: Example) -> Prompt:
        if self.is_chat:
            conversation = expand_transcript(example).prompt
            return Prompt(prompt=self._render(conversation), conversation=conversation, columns=dict(example.columns))
        if not example.is_text:
            raise Unusable("messages cannot be used as plain text", "messages need a chat template.")
        return Prompt(prompt=example.prompt.messages[0].content, columns=dict(example.columns))

    def pair(self, example: Example) -> PreferencePair:
        prompt = self.prompt(example)
        if self.is_chat:
            example = expand_transcript(example)
        chosen, rejected = (self._completion(prompt, answer) for answer in example.answers)
        return PreferencePair(
            prompt=prompt.prompt,
            chosen=chosen,
            rejected=rejected,
            margin=example.margin,
            conversation=prompt.conversation,
        )

    def rated(self, example: Example) -> RatedText:
        prompt = self.prompt(example)
        if self.is_chat:
            example = expand_transcript(example)
        (answer,) = example.answers
        assert answer.rating is not None
        return RatedText(
            prompt=prompt.prompt,
            completion=self._completion(prompt, answer),
            rating=answer.rating,
            conversation=prompt.conversation,
        )

    def demonstrations(self, example: Example) -> Iterator[Demonstration]:
        """One demonstration with all answers to learn, or one for each if the template renders earlier turns differently."""
        if not self.is_chat:
            turn = Turn(context=self.prompt(example).prompt, answer=example.answers[0].messages[0].content)
            yield Demonstration(turns=(turn,))
            return
        example = expand_transcript(example)
        conversation, (answer,) = example.prompt, example.answers
        whole = Conversation(messages=(*conversation.messages, *answer.messages), tools=conversation.tools)
        first = len(conversation.messages)
        learned = [i for i, m in enumerate(whole.messages) if i >= first and m.role == "assistant" and m.is_learned]
        if not learned:
            raise Unusable("no answer to learn", "the source excludes every answer from training.")
        if self.assistant_turns == "last":
            learned = learned[-1:]
        turns = self._turns(whole, learned)
        if turns:
            yield Demonstration(turns=turns, conversation=whole)
            return
        for index in learned:
            before = Conversation(messages=whole.messages[:index], tools=whole.tools)
            prompt = Prompt(prompt=self._render(before), conversation=before)
            message = whole.messages[index]
            turn = Turn(context=prompt.prompt, answer=self._completion(prompt, Answer(messages=(message,))))
            yield Demonstration(
                turns=(turn,),
                conversation=Conversation(messages=(*before.messages, message), tools=whole.tools),
            )

    # --- texts ---

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        try:
            text = render_chat(
                self.tokenizer,
                conversation.messages,
                tools=conversation.tools,
                date=self.date,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program and can raise any exception
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise Unusable(
                "the chat template rejects it", f"the model's chat template rejects it ({reason})."
            ) from error
        _require_all_rendered(text, conversation)
        return text

    def _completion(self, prompt: Prompt, answer: Answer) -> str:
        """The text of an answer as the template writes it after the prompt, without the token that ends it."""
        last = answer.messages[-1]
        if prompt.conversation is None:
            return last.content
        messages = (*prompt.conversation.messages, *answer.messages)
        whole = Conversation(messages=messages, tools=prompt.conversation.tools)
        text = self._render(whole, add_generation_prompt=False)
        if text.startswith(prompt.prompt):
            return _without_end(text[len(prompt.prompt) :], last.content, self._end)
        if len(answer.messages) > 1 or last.tool_calls:
            raise Unusable(
                "the chat template rewrites earlier turns",
                "the chat template renders the prompt differently once an answer follows.",
            )
        turns = self._render(prompt.conversation, add_generation_prompt=False)
        opening = prompt.prompt.removeprefix(turns) if prompt.prompt.startswith(turns) else ""
        return without_opening(opening, last.content)

    @property
    def _end(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(response_end_id(self.tokenizer, is_chat=True)))

    # --- the answers of a conversation ---

    def _turns(self, whole: Conversation, learned: Sequence[int]) -> tuple[Turn, ...]:
        """The rendered conversation as contexts and answers; empty if the answers cannot be told apart in one text."""
        if marks_answers(self.tokenizer):
            text, spans = marked_spans(self.tokenizer, whole.messages, tools=whole.tools, date=self.date)
            _require_all_rendered(text, whole)
            answers = [i for i, m in enumerate(whole.messages) if m.role == "assistant"]
            if len(spans) == len(answers):
                return self._split(text, [spans[answers.index(index)] for index in learned], ends_included=True)
        last = Conversation(messages=whole.messages[: learned[-1] + 1], tools=whole.tools)
        text, spans = self._render(last, add_generation_prompt=False), []
        for index in learned:
            before = self._render(Conversation(messages=whole.messages[:index], tools=whole.tools))
            after = Conversation(messages=whole.messages[: index + 1], tools=whole.tools)
            alone = self._render(after, add_generation_prompt=False)
            answer = _without_end(alone[len(before) :], whole.messages[index].content, self._end)
            # Some templates write an answer differently, for example without its thoughts, once more messages follow.
            if not alone.startswith(before) or not text.startswith(before + answer):
                return ()
            spans.append((len(before), len(before) + len(answer)))
        return self._split(text, spans, ends_included=False)

    def _split(self, text: str, spans: Sequence[Span], *, ends_included: bool) -> tuple[Turn, ...]:
        """Cut the text at the spans of its answers; empty if an answer before the last has no token that ends it."""
        turns, position = [], 0
        for number, (start, end) in enumerate(spans):
            if ends_included and self._end in text[start:end]:
                end = start + text[start:end].rindex(self._end)
            if not position <= start <= end:
                return ()
            turns.append(Turn(context=text[position:start], answer=text[start:end]))
            position = end
            if number + 1 < len(spans):
                if not text.startswith(self._end, end):
                    return ()
                position = end + len(self._end)
        return tuple(turns)


def expand_transcript(example: Example) -> Example:
    """The turns of a Human/Assistant transcript as messages; any other example as it is."""
    messages = parse_transcript(example.prompt.messages[0].content) if example.is_text else ()
    if not messages:
        return example
    answers = []
    for answer in example.answers:
        turns = parse_transcript(f"Human: ?\n\nAssistant: {answer.messages[0].content}")[1:]
        answers.append(replace(answer, messages=turns) if turns else answer)
    prompt = replace(example.prompt, messages=messages)
    return replace(example, prompt=prompt, answers=tuple(answers), is_text=False)


def _without_end(text: str, content: str, end: str) -> str:
    """What the template writes for an answer, up to the token that ends it; without one, up to the end of its content."""
    if end in text:
        return text[: text.rindex(end)]
    stripped = content.strip()
    position = text.find(stripped)
    return text[: position + len(stripped)] if position >= 0 and stripped else text.rstrip()


def _require_all_rendered(text: str, conversation: Conversation) -> None:
    """Raise Unusable if the template has left out the content of a message or a tool call."""
    rendered = " ".join(text.split())
    for message in conversation.messages:
        # Templates leave out the thoughts of earlier answers on purpose.
        content = " ".join(message.content.rpartition("</think>")[2].split())
        if message.role != "tool" and content not in rendered:
            raise Unusable(
                f"the chat template leaves out messages of the {message.role if message.role in ROLES else 'others'}",
                f"the model's chat template does not write the message {content[:60]!r} of the {message.role}.",
            )
        for call in message.tool_calls:
            if call.name not in rendered:
                raise Unusable(
                    "the chat template leaves out tool calls",
                    f"the model's chat template does not write the call of {call.name[:60]!r}.",
                )
    if conversation.tools and not any(name in rendered for name in _tool_names(conversation.tools)):
        raise Unusable("the chat template leaves out tools", "the model's chat template does not write the tools.")


def _tool_names(tools: str) -> list[str]:
    return [str((tool.get("function") or tool).get("name", "")) for tool in json.loads(tools)]
