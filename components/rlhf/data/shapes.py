"""Converts rows to examples: the shapes of the common data sets. docs/data.md lists them, each with a row."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from components.rlhf.data.examples import Answer, Example, Unusable, as_text
from components.rlhf.data.files import Row
from components.rlhf.data.messages import parse_messages, parse_tools
from components.rlhf.data.records import Conversation, Message

# The names under which data sets have a field; the first one that a row has is taken.
NAMES = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "completion": ("completion", "response", "output", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "input": ("input", "context"),
    "rating": ("rating", "overall_score", "helpfulness", "score"),
    "answers": ("answers", "completions", "responses"),
    "ratings": ("ratings", "scores"),
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating"),
}
REPEATED_PROMPT = "prompt repeated in its answers"
MIN_REPEATED = 12  # characters


class Fields:
    """The fields of one row that are not null, under the names of NAMES. used collects the columns that were asked for and found."""

    def __init__(self, row: Row) -> None:
        self.row = {name: value for name, value in row.items() if value is not None}
        self.used: set[str] = set()

    def get(self, field: str) -> Any:
        for name in NAMES.get(field, (field,)):
            if name in self.row:
                self.used.add(name)
                return self.row[name]
        return None

    def has(self, *fields: str) -> bool:
        return all(any(name in self.row for name in NAMES.get(field, (field,))) for field in fields)

    def text(self, field: str) -> str:
        value = self.get(field)
        if value is None:
            raise self.missing(field)
        if not isinstance(value, str):
            raise Unusable(f"{field} is not text", f"{field} has type {type(value).__name__}; it must be a string.")
        return value

    def number(self, field: str) -> float | None:
        """A finite number, or None if the field is absent or NaN."""
        value = self.get(field)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        try:
            number = float("nan") if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise Unusable(f"{field} is not a number", f"{field} is {str(value)[:80]!r}; it must be a finite number.")
        return number

    def missing(self, field: str, advice: str = "map it in columns or correct the data") -> Unusable:
        found = ", ".join(self.row) or "none"
        return Unusable(f"no field {field!r}", f"no field {field!r} (found: {found[:200]}); {advice}.")


def to_demonstrations(fields: Fields) -> Iterator[Example]:
    """One demonstration: a conversation with answers of the assistant, or a prompt with its completion."""
    if fields.get("label") is False:  # a number may be the label of something else
        raise Unusable("labelled as bad", is_defect=False)
    if fields.has("messages") and not fields.has("chosen"):
        messages = parse_messages(fields.get("messages"), "messages")
        tools = parse_tools(fields.get("tools"))
        first = _first_answer(messages)
        if messages[-1].role != "assistant":
            raise Unusable("does not end with an answer", f"the last message has the role {messages[-1].role!r}.")
        conversation = Conversation(messages=_with_system(fields, messages[:first]), tools=tools)
        yield Example(prompt=conversation, answers=(Answer(messages=messages[first:]),))
    elif fields.has("completion"):
        prompt, is_text = _prompt(fields)
        yield _with_answers(prompt, is_text, [_answer(fields, "completion")])
    elif fields.has("chosen"):
        pair = next(_chosen_and_rejected(fields))
        yield replace(pair, answers=pair.answers[:1], margin=None)
    else:
        raise fields.missing("completion" if fields.has("prompt") else "prompt", _nearest(fields, "demonstrations"))


def to_prompts(fields: Fields) -> Iterator[Example]:
    """One prompt: a text, or the messages up to the answer that is to be given."""
    if fields.has("prompt") or fields.has("input"):
        prompt, is_text = _prompt(fields)
    elif fields.has("messages"):
        messages = parse_messages(fields.get("messages"), "messages")
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if all(m.role == "system" for m in messages):
            raise Unusable("no message to answer", "messages contain no message that the assistant could answer.")
        tools = parse_tools(fields.get("tools"))
        prompt, is_text = Conversation(messages=_with_system(fields, messages), tools=tools), False
    elif fields.has("chosen"):
        pair = next(_chosen_and_rejected(fields))
        prompt, is_text = pair.prompt, pair.is_text
    else:
        raise fields.missing("prompt", _nearest(fields, "prompts"))
    yield Example(prompt=prompt, is_text=is_text)


def to_preferences(fields: Fields) -> Iterator[Example]:
    """One pair, or one rated answer for each answer that the row rates."""
    if fields.has("chosen") or fields.has("rejected"):
        yield from _chosen_and_rejected(fields)
        return
    for first, second, better in TWO_ANSWERS:
        if first in fields.row and second in fields.row and all(name in fields.row for name in better):
            yield _two_answers(fields, first, second, better)
            return
    if "summaries" in fields.row and "choice" in fields.row:
        yield _summaries(fields)
    elif fields.has("answers"):
        yield from _rated_answers(fields)
    elif fields.has("completion") and (fields.has("label") or fields.has("rating")):
        prompt, is_text = _prompt(fields)
        yield _with_answers(prompt, is_text, [_answer(fields, "completion", _rating(fields))])
    else:
        raise fields.missing("chosen", _nearest(fields, "preferences"))


# --- prompts and answers ---


def _prompt(fields: Fields) -> tuple[Conversation, bool]:
    """The prompt of a row, and whether it is a plain text."""
    tools = parse_tools(fields.get("tools"))
    value, has_input = fields.get("prompt"), fields.has("input")
    if value is None and not has_input:
        raise fields.missing("prompt")
    if value is None:
        value, has_input = fields.get("input"), False
    if isinstance(value, list | Mapping):
        messages = parse_messages(value, "prompt")
        return Conversation(messages=_with_system(fields, messages), tools=tools), False
    if not isinstance(value, str):
        raise Unusable(
            "prompt is not text", f"prompt has type {type(value).__name__}; it must be a string or messages."
        )
    if not value.strip():
        raise Unusable("empty text", "prompt is empty.")
    if has_input and isinstance(more := fields.get("input"), str) and more.strip():
        value = f"{value}\n\n{more}"
    history = _history(fields)
    messages = _with_system(fields, (*history, *as_text(value)))
    return Conversation(messages=messages, tools=tools), len(messages) == 1 and not tools


def _history(fields: Fields) -> tuple[Message, ...]:
    """Earlier turns as pairs of question and answer."""
    history = fields.get("history")
    if not history or isinstance(history, str):
        return ()
    if not all(isinstance(t, list) and len(t) == 2 and all(isinstance(x, str) for x in t) for t in history):
        raise Unusable("history is not pairs of texts", "history must be a list of [question, answer] pairs.")
    return tuple(m for question, answer in history for m in (*as_text(question), *as_text(answer, "assistant")))


def _with_system(fields: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the row's own system prompt, if it has one and they have none."""
    system = fields.get("system")
    if not isinstance(system, str) or not system.strip() or any(m.role == "system" for m in messages):
        return messages
    return (*as_text(system, "system"), *messages)


def _answer(fields: Fields, field: str, rating: float | None = None) -> Answer:
    value = fields.get(field)
    if isinstance(value, list | Mapping):
        return Answer(messages=parse_messages(value, field), rating=rating)
    text = fields.text(field)
    if not text.strip():
        raise Unusable("empty text", f"{field} is empty.")
    return Answer(messages=as_text(text, "assistant"), rating=rating)


def _with_answers(prompt: Conversation, is_text: bool, answers: list[Answer], margin: float | None = None) -> Example:
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


def _first_answer(messages: tuple[Message, ...]) -> int:
    """Index of the first message of the assistant after a message of somebody else."""
    for index, message in enumerate(messages):
        if message.role == "assistant" and any(m.role not in ("system", "assistant") for m in messages[:index]):
            return index
    raise Unusable("no answer to learn", "messages have no message of the assistant after one of the user.")


# --- pairs ---


def _chosen_and_rejected(fields: Fields) -> Iterator[Example]:
    margin = fields.number("margin")
    scores = fields.number("score_chosen"), fields.number("score_rejected")
    if margin is None and scores[0] is not None and scores[1] is not None:
        margin = scores[0] - scores[1]
    answers = [_answer(fields, "chosen"), _answer(fields, "rejected")]
    yield _pair(fields, answers, margin)


def _pair(fields: Fields, answers: list[Answer], margin: float | None) -> Example:
    """The pair of two answers, better first, to the row's prompt or else to their common opening."""
    if fields.has("prompt") or fields.has("input"):
        prompt, is_text = _prompt(fields)
    elif fields.has("messages"):
        prompt = Conversation(
            messages=_with_system(fields, parse_messages(fields.get("messages"), "messages")),
            tools=parse_tools(fields.get("tools")),
        )
        is_text = False
    else:
        opening, is_text, answers = _common_opening(answers)
        prompt = Conversation(messages=_with_system(fields, opening), tools=parse_tools(fields.get("tools")))
        is_text = is_text and len(prompt.messages) == 1 and not prompt.tools
    return _with_answers(prompt, is_text, answers, margin)


def _common_opening(answers: list[Answer]) -> tuple[tuple[Message, ...], bool, list[Answer]]:
    """What two answers without a prompt have in common at their beginning, whether that is a text, and the rest of both."""
    first, second = (answer.messages for answer in answers)
    if first == second:
        raise Unusable("equal answers", is_defect=False)
    if len(first) == len(second) == 1:
        cut = _opening_length(first[0].content, second[0].content)
        opening, rests = first[0].content[:cut], (first[0].content[cut:], second[0].content[cut:])
        if not opening.strip():
            raise Unusable("no prompt", "there is no field 'prompt', and chosen and rejected have no common opening.")
        return as_text(opening), True, [Answer(messages=as_text(rest, "assistant")) for rest in rests]
    length = next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )
    while length and first[length - 1].role == "assistant":  # the answer of one goes on where the other ends
        length -= 1
    if length == 0:
        raise Unusable("no prompt", "there is no field 'prompt', and chosen and rejected have no common opening.")
    return first[:length], False, [Answer(messages=messages[length:]) for messages in (first, second)]


def _opening_length(first: str, second: str) -> int:
    """Number of characters of the common opening: of a transcript up to the last `Assistant:`, else up to the last space."""
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    marker = "\n\nAssistant:"
    if first.lstrip().startswith("Human:") and marker in first[:common]:
        return first.rindex(marker, 0, common) + len(marker)
    while common and not first[common - 1 : common].isspace():
        common -= 1
    return len(first[:common].rstrip())


def _two_answers(fields: Fields, first: str, second: str, better: tuple[str, ...]) -> Example:
    """The pair of a row with two answers in fixed order and a statement which one is better."""
    answers = [_answer(fields, first), _answer(fields, second)]
    strength = _strength(fields, better)
    if strength == 0:
        raise Unusable("tie", is_defect=False)
    margin = abs(strength) if better[0] in WITH_STRENGTH else None
    question, history, context = (fields.row.get(name) for name in ("question", "history", "context"))
    if isinstance(question, dict):  # WebGPT
        fields.row["question"] = question.get("full_text")
    elif isinstance(history, str):  # SHP: the post that is answered
        fields.row["prompt"] = fields.get("history")
    elif isinstance(context, list) and not fields.has("prompt"):
        fields.row["prompt"] = fields.get("context")
    fields.row.pop("history", None)
    return _pair(fields, answers if strength > 0 else answers[::-1], margin)


# First answer, second answer, and the columns that say which one is better.
TWO_ANSWERS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("answer_a", "answer_b", ("preference",)),
    ("response_1", "response_2", ("preference_strength",)),
    ("response1", "response2", ("overall_preference",)),
    ("human_ref_A", "human_ref_B", ("labels",)),
    ("response_0", "response_1", ("better_response_id",)),
    ("conversation_a", "conversation_b", ("winner",)),
    ("response_a", "response_b", ("winner",)),
    ("answer_0", "answer_1", ("score_0", "score_1")),
)
WITH_STRENGTH = ("preference_strength", "overall_preference", "score_0")
FIRST, SECOND, TIE = (
    ("a", "model_a", "answer_a", "response_a"),
    ("b", "model_b", "answer_b", "response_b"),
    ("tie", "both", "tie (bothbad)", "neither"),
)


def _strength(fields: Fields, better: tuple[str, ...]) -> float:
    """Above 0 if the first answer is better, below 0 if the second is, 0 for a tie."""
    if len(better) == 2:
        scores = [fields.number(name) or 0.0 for name in better]
        return scores[0] - scores[1]
    (name,) = better
    value = fields.get(name)
    if isinstance(value, str) and value.lower() in (*FIRST, *SECOND, *TIE):
        return float(value.lower() in FIRST) - float(value.lower() in SECOND)
    number = fields.number(name) if not isinstance(value, bool) else None
    if name == "labels" and number in (0, 1):  # 1: the first is preferred
        return 2 * number - 1
    if name == "better_response_id" and number in (0, 1):  # the number of the better one
        return 1 - 2 * number
    if name in ("preference_strength", "overall_preference") and number is not None:
        return -number  # negative: the first is better
    raise Unusable(
        f"{name} is not a preference",
        f"{name} is {str(value)[:80]!r}; it must say which answer is better: a, b or tie.",
    )


def _summaries(fields: Fields) -> Example:
    """A row of openai/summarize_from_feedback: two summaries of one post."""
    info, summaries, choice = fields.get("info"), fields.get("summaries"), fields.get("choice")
    text = next((info[key] for key in ("post", "article") if isinstance(info, dict) and info.get(key)), None)
    if not isinstance(text, str) or not isinstance(summaries, list) or len(summaries) != 2 or choice not in (0, 1):
        raise Unusable(
            "two summaries with a choice cannot be read",
            "info, summaries and choice must be a post, two texts and 0 or 1.",
        )
    texts = [s.get("text") if isinstance(s, dict) else None for s in summaries]
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise Unusable("empty text", "a summary is empty.")
    answers = [Answer(messages=as_text(str(t), "assistant")) for t in texts]
    return _with_answers(Conversation(messages=as_text(text)), True, answers if choice == 0 else answers[::-1])


# --- ratings ---


def _rated_answers(fields: Fields) -> Iterator[Example]:
    """One example for each of several rated answers to a prompt."""
    prompt, is_text = _prompt(fields)
    answers, ratings = fields.get("answers"), fields.get("ratings")
    if not isinstance(answers, list) or not answers:
        raise Unusable(
            "answers is not a list", "answers must be a list of texts, or of objects with a text and a rating."
        )
    if ratings is not None and (not isinstance(ratings, list) or len(ratings) != len(answers)):
        raise Unusable("ratings do not match the answers", f"ratings must be a list of {len(answers)} numbers.")
    for number, answer in enumerate(answers):
        row = dict(answer) if isinstance(answer, Mapping) else {"completion": answer}
        if isinstance(row.get("text"), str) or isinstance(row.get("content"), str):
            row.setdefault("completion", row.get("text") or row.get("content"))
        if ratings is not None:
            row["rating"] = ratings[number]
        own = Fields(row)
        yield _with_answers(prompt, is_text, [_answer(own, "completion", _rating(own))])


def _rating(fields: Fields) -> float:
    """A rating, a good/bad label as 1 or 0, or a rank (1 is the best) with its sign changed."""
    label = fields.get("label")
    if label in (0, 1):
        return float(label)
    for name, sign in (("rating", 1.0), ("pm_score", 1.0), ("rank", -1.0)):
        if fields.has(name):
            value = fields.get(name)
            if isinstance(value, str):  # UltraFeedback writes ratings as text, N/A among them
                try:
                    fields.row = {
                        **fields.row,
                        **{key: float(value) for key in fields.used if fields.row[key] is value},
                    }
                except ValueError:
                    raise Unusable("rating is not a number", f"{name} is {value[:80]!r}.") from None
            number = fields.number(name)
            if number is not None:
                return sign * number
    raise fields.missing("rating")


# --- advice ---


def _nearest(fields: Fields, section: str) -> str:
    """What a row that cannot be read most resembles, and what to do with it."""
    if "text" in fields.row and section == "prompts":
        return "set columns: {prompt: text}"
    if "text" in fields.row:
        return "a text alone has no prompt; split it into prompt and completion"
    if section == "preferences" and fields.has("completion"):
        return (
            "an answer alone is no preference; add a second one as chosen and rejected, or a rating or a label for each"
        )
    if section == "demonstrations" and fields.has("answers"):
        return "choose the answer to learn, and save it as completion"
    return "map it in columns or correct the data"


CONVERTERS = {"demonstrations": to_demonstrations, "preferences": to_preferences, "prompts": to_prompts}
