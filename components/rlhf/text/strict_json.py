"""A strict JSON parser: duplicate keys, NaN, infinities, lone surrogates and too deep nesting are errors.

The standard parser accepts NaN, keeps the last of duplicate keys, and raises three types of errors.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class NotJsonError(ValueError):
    """The text is not strict JSON; the message is the reason, as part of a sentence."""


def parse_json(text: str | bytes, parse_int: Callable[[str], int] = int) -> Any:
    """Parse JSON text (bytes are UTF-8). Raises only NotJsonError."""
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_require_unique_keys,
            parse_constant=_reject_constant,
            parse_int=parse_int,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError as error:
        raise NotJsonError(f"not UTF-8, byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise NotJsonError(f"{error.msg}, {line}column {error.colno}") from None
    except RecursionError:
        raise NotJsonError("it is nested too deeply") from None
    except NotJsonError:
        raise
    except ValueError:  # Python limits the digits of an integer, because parsing takes quadratic time
        raise NotJsonError("a number has thousands of digits") from None
    if _may_have_lone_surrogate(text) and _has_lone_surrogate(value):
        raise NotJsonError("it contains a lone UTF-16 surrogate, \\ud800 to \\udfff")
    return value


class Validator(Protocol[T_co]):
    """The part of pydantic.TypeAdapter that is used here; this package does not import pydantic."""

    def validate_json(self, data: str | bytes, /, *, strict: bool) -> T_co: ...


def parse_json_as(validator: Validator[T_co], text: str | bytes) -> T_co:
    """Parse JSON text as the type of a pydantic TypeAdapter, in strict mode. Raises only NotJsonError.

    Integers must fit into 64 bits; pydantic would accept larger ones as floats, and the largest as infinity.
    """
    parse_json(text, _parse_int64)
    try:
        return validator.validate_json(text, strict=True)
    except ValueError as error:  # pydantic's ValidationError
        (problem, *_) = error.errors(include_url=False, include_context=False)  # type: ignore[attr-defined]
        location = ".".join(str(part) for part in problem["loc"])[:80]
        raise NotJsonError(f"{location!a}: {problem['msg']}" if location else str(problem["msg"])) from None


def _require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise NotJsonError(f"the key {duplicate[:80]!a} is duplicated")
    return value


def _reject_constant(name: str) -> Any:
    raise NotJsonError(f"{name} is not a JSON number")


def _parse_int64(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise NotJsonError(f"the number {text[:40]} is too large")
    return value


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotJsonError(f"the number {text[:40]} is too large")
    return value


def _may_have_lone_surrogate(text: str | bytes) -> bool:
    """Only an escape in the JSON text, or the str that it is passed as, can contain one."""
    return not isinstance(text, bytes) or b"\\u" in text


def _has_lone_surrogate(value: Any) -> bool:
    """Whether any string cannot be encoded as UTF-8, which tokenizers and files require."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
