"""Converts rows of preference data: pairs, two answers with a statement which is better, and rated answers."""

from collections.abc import Iterator, Mapping

from components.rlhf.data.answers import answer_of, prompt_of, with_answers, with_system
from components.rlhf.data.examples import Answer, Example, Unusable, as_text
from components.rlhf.data.fields import Fields, nearest
from components.rlhf.data.messages import parse_messages, parse_tools
from components.rlhf.data.records import Conversation, Message


def to_preferences(fields: Fields) -> Iterator[Example]:
    """One pair, or one rated answer for each answer that the row rates."""
    if fields.has("chosen") or fields.has("rejected"):
        yield from chosen_and_rejected(fields)
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
        prompt, is_text = prompt_of(fields)
        yield with_answers(prompt, is_text, [answer_of(fields, "completion", _rating(fields))])
    else:
        raise fields.missing("chosen", nearest(fields, "preferences"))


# --- pairs ---


def chosen_and_rejected(fields: Fields) -> Iterator[Example]:
    margin = fields.number("margin")
    scores = fields.number("score_chosen"), fields.number("score_rejected")
    if margin is None and scores[0] is not None and scores[1] is not None:
        margin = scores[0] - scores[1]
    answers = [answer_of(fields, "chosen"), answer_of(fields, "rejected")]
    yield _pair(fields, answers, margin)


def _pair(fields: Fields, answers: list[Answer], margin: float | None) -> Example:
    """The pair of two answers, better first, to the row's prompt or else to their common opening."""
    if fields.has("prompt") or fields.has("input"):
        prompt, is_text = prompt_of(fields)
    elif fields.has("messages"):
        prompt = Conversation(
            messages=with_system(fields, parse_messages(fields.get("messages"), "messages")),
            tools=parse_tools(fields.get("tools")),
        )
        is_text = False
    else:
        opening, is_text, answers = _common_opening(answers)
        prompt = Conversation(messages=with_system(fields, opening), tools=parse_tools(fields.get("tools")))
        is_text = is_text and len(prompt.messages) == 1 and not prompt.tools
    return with_answers(prompt, is_text, answers, margin)


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
    answers = [answer_of(fields, first), answer_of(fields, second)]
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
    return with_answers(Conversation(messages=as_text(text)), True, answers if choice == 0 else answers[::-1])


# --- ratings ---


def _rated_answers(fields: Fields) -> Iterator[Example]:
    """One example for each of several rated answers to a prompt."""
    prompt, is_text = prompt_of(fields)
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
        yield with_answers(prompt, is_text, [answer_of(own, "completion", _rating(own))])


def _rating(fields: Fields) -> float:
    """A rating, a good/bad label as 1 or 0, or a rank (1 is the best) with its sign changed."""
    label = fields.get("label")
    if label in (0, 1):
        return float(label)
    for name, sign in (("rating", 1.0), ("pm_score", 1.0), ("rank", -1.0)):
        value = _from_text(fields.get(name))
        number = fields.finite(name, value)
        if number is not None:
            return sign * number
    raise fields.missing("rating")


def _from_text(value: object) -> object:
    """The number that a text holds: tables and some data sets write ratings as text. Any other value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
