"""Checks of a response against a right answer or a rule: equal text, regular expression, value of a formula, JSON schema.

Some may take for ever on a hostile response: check_process.py runs them with a time-out. Only the standard library is imported at the top.
"""

import re
from collections import deque
from functools import cache, lru_cache
from typing import Any

from components.rlhf.text.strict_json import NotJsonError, parse_json

NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(?:[eE][-+]?\d+)?\s*%?")
# Words in LaTeX are commands or their texts; other words make a product of letters, which no response ever equals.
LATEX_WORDS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\{[a-z]+matrix\}"
)
FULL_STOP = re.compile(r"(?<=\d)\.(?=\s|$)")
WORD = re.compile(r"[^\W\d_]{3,}")


class BadAnswerError(ValueError):
    """The data, not the response, is wrong; the message is the rest of a sentence about the text of the column."""


def equal_text(response: str, answer: str, *, after: str, ignore_case: bool) -> bool:
    """Whether the response, or what follows the last `after` in it, is the answer, but for white space around them."""
    if after:
        _, found, response = response.rpartition(after)
        if not found:
            return False
    texts = [text.strip() for text in (response, answer)]
    if ignore_case:
        texts = [text.casefold() for text in texts]
    return texts[0] == texts[1]


def matches(pattern: str, response: str, answer: str | None) -> bool:
    """Whether the pattern is found or, with an answer, whether the first group (or all) of its last match is the answer."""
    if answer is None:
        return re.search(pattern, response) is not None
    found = deque(re.finditer(pattern, response), maxlen=1)
    if not found:
        return False
    last = found[0]
    extracted = last[1] if last.re.groups else last[0]
    return extracted is not None and extracted.strip() == answer.strip()


def same_value(response: str, answer: str) -> bool:
    """Whether the last number or formula of the response has the value of the answer, by math-verify."""
    right = _value_of(answer)
    if not right:
        raise BadAnswerError("is neither a number nor a LaTeX formula")
    from math_verify import parse, verify

    # The library takes the full stop in "It is 49/9." for a decimal point, and then the fraction for another number.
    found = parse(FULL_STOP.sub("", response), parsing_timeout=None)
    return bool(found) and bool(verify(right, found, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _value_of(answer: str) -> list[Any]:
    """The values of a right answer, which is a number or a LaTeX formula as a whole; empty for words, which are neither."""
    from math_verify import parse

    if WORD.search(LATEX_WORDS.sub("", answer)):
        return []
    is_formula = not NUMBER.fullmatch(answer.strip()) and "$" not in answer and "\\boxed" not in answer
    values = parse(f"${answer}$" if is_formula else answer, parsing_timeout=None)
    return [value for value in values if not isinstance(value, str)]


def satisfies(response: str, schema: str) -> bool:
    """Whether the response, or the fenced code block that it consists of, is strict JSON that satisfies a schema."""
    validator = _validator(schema)
    try:
        value = parse_json(unfenced(response))
    except NotJsonError:
        return False
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise BadAnswerError(f"refers to {str(error.ref)[:80]}, which cannot be found in it") from None


@cache
def _validator(schema: str) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    from components.rlhf.config.scoring import schema_problem

    if problem := schema_problem(schema):
        raise BadAnswerError(f"is no JSON schema ({problem})")
    parsed = parse_json(schema)
    # An empty registry: references to other documents are not downloaded.
    return validator_for(parsed, default=Draft202012Validator)(parsed, registry=Registry())


def unfenced(text: str) -> str:
    """The content of a text that is one fenced code block, else the text."""
    text = text.strip()
    first, line_break, rest = text.partition("\n")
    is_fenced = re.fullmatch(r"```[\w+-]*", first.strip()) and line_break and rest.endswith("```")
    return rest[:-3] if is_fenced else text
