"""What is wrong with settings, in one sentence: the key, the problem, and the nearest valid key."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from components.rlhf.config.checks import SECTIONS as CHECKS
from components.rlhf.config.environment import SECTIONS as ENVIRONMENTS
from components.rlhf.config.judge import SECTIONS as JUDGES
from components.rlhf.config.rewards import SECTIONS as REWARDS

KINDS: dict[str, type[BaseModel]] = {
    **JUDGES,
    **REWARDS,
    **ENVIRONMENTS,
    **CHECKS,
}  # sections by the tag that pydantic puts before their keys
UNION_TAGS = ("one", "several")  # pydantic puts them between data.prompts and the keys of its source or sources
MAX_ERRORS, MAX_VALUE_CHARS = 5, 120  # in one error message


def explain_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence with the key and the problem of each error, and the closest valid key for a misspelled one."""
    errors = error.errors(include_url=False)
    text = "; ".join(_explain_one(dict(details), model) for details in errors[:MAX_ERRORS])
    if len(errors) > MAX_ERRORS:
        text += f"; and {len(errors) - MAX_ERRORS} more"
    return text if text.endswith("?") else f"{text}."


def short_repr(value: object) -> str:
    """The repr of a value, truncated to fit into an error message."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return "a number with thousands of digits"
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 20]}... ({len(text):,} characters)"


def _explain_one(details: dict[str, Any], model: type[BaseModel]) -> str:
    path = [_printable_key(part) for part in details["loc"] if not _is_tag(part)]
    key = ".".join(path) or "the parameters"
    if details["type"] == "extra_forbidden":
        valid_keys = _valid_keys(model, details["loc"][:-1])
        hint = f"valid here: {', '.join(valid_keys) or 'nothing'}"
        for match in get_close_matches(path[-1], valid_keys, n=1, cutoff=0.5):
            hint = f"did you mean {'.'.join([*path[:-1], match])}?"
        return f"{key} is not a parameter; {hint}"
    if details["type"] == "missing":
        return f"{key} is missing"
    if details["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {short_repr(details['input'])}: expected a section with the keys {', '.join(_valid_keys(model, details['loc']))}"
    message = str(details["msg"]).removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key} is {short_repr(details['input'])}: {message[0].lower()}{message[1:]}"


def _printable_key(part: str | int) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= MAX_VALUE_CHARS else short_repr(text)


def _is_tag(part: str | int) -> bool:
    return part in UNION_TAGS or part in KINDS


def _valid_keys(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Valid keys of the section at a pydantic location, which may contain tags, keys of mappings and indices of lists."""
    sections: list[type[BaseModel]] = [model]
    is_key_of_mapping = False
    for part in loc:
        fields = sections[0].model_fields
        if is_key_of_mapping:
            is_key_of_mapping = False
        elif part in KINDS:
            sections = [KINDS[str(part)]]
        elif part in fields:
            annotation = fields[str(part)].annotation
            sections = sections_in(annotation)
            is_key_of_mapping = getattr(annotation, "__origin__", None) is dict
        if not sections:
            return []
    return list(sections[0].model_fields)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in an annotation, at any depth, without duplicates."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [section for part in getattr(annotation, "__args__", ()) for section in sections_in(part)]
    return list(dict.fromkeys(found))
