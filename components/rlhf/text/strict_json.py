"""JSON that means one thing: what parsers disagree on, or fall over, is refused.

The standard parser takes NaN, lets the last of two equal keys win, and raises three kinds of errors.
"""

import json
import math
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class NotJsonError(ValueError):
    """Why a text is not JSON that can be read, as part of a sentence."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text (bytes are UTF-8). Raises NotJsonError, and nothing else, for whatever else it is."""
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise NotJsonError(f"not UTF-8, byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise NotJsonError(f"{error.msg}, {line}column {error.colno}") from None
    except RecursionError:
        raise NotJsonError("nested too deep") from None
    except NotJsonError:
        raise
    except ValueError:  # Python's limit against quadratic time
        raise NotJsonError("a number has thousands of digits") from None
    if _may_have_lone_surrogate(text) and _has_lone_surrogate(value):
        raise NotJsonError("half of a UTF-16 surrogate pair, \\ud800 to \\udfff")
    return value


class Validator(Protocol[T_co]):
    """A pydantic TypeAdapter; this room does without pydantic itself."""

    def validate_json(self, data: str | bytes, /, *, strict: bool) -> T_co: ...


def parse_json_as(validator: Validator[T_co], text: str | bytes) -> T_co:
    """A JSON text as the type of a pydantic TypeAdapter, without conversions. Raises NotJsonError, and nothing else."""
    parse_json(text)
    try:
        return validator.validate_json(text, strict=True)
    except ValueError as error:  # pydantic's ValidationError
        (problem, *_) = error.errors(include_url=False, include_context=False)  # type: ignore[attr-defined]
        where = ".".join(str(part) for part in problem["loc"])[:80]
        raise NotJsonError(f"{where!a}: {problem['msg']}" if where else str(problem["msg"])) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        again = next(key for key in keys if keys.count(key) > 1)
        raise NotJsonError(f"the key {again[:80]!a} stands there twice")
    return found


def _constant(name: str) -> Any:
    raise NotJsonError(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotJsonError(f"{text[:40]} is too large a number")
    return value


def _may_have_lone_surrogate(text: str | bytes) -> bool:
    """JSON can escape one half of a pair, and str can hold it."""
    return not isinstance(text, bytes) or b"\\u" in text


def _has_lone_surrogate(value: Any) -> bool:
    """Whether any text in it is no Unicode, which no tokenizer and no file takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
