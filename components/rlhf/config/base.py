"""Base class of all settings: strict, immutable, with a canonical JSON form."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from components.rlhf.text.credentials import contains_credentials
from components.rlhf.text.strict_yaml import unprintable_character

PositiveInt = Annotated[int, Field(ge=1, lt=2**53)]  # JSON represents integers exactly up to 2**53
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Confidence = Annotated[float, Field(gt=0, lt=1)]  # level of an interval


class BaseConfig(BaseModel):
    """Rejects unknown keys; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    TEXTS: ClassVar[frozenset[str]] = frozenset()  # fields whose strings may have several lines

    @field_validator("*")
    @classmethod
    def _reject_control_characters(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = "\n\t" if info.field_name in cls.TEXTS else ""
        for text in _strings(value):
            bad = next((c for c in text if unprintable_character(c) and c not in allowed), None)
            if bad is not None:
                raise ValueError(f"it contains the character {bad!a}; remove it")
        return value

    @field_validator("*")
    @classmethod
    def _reject_credentials(cls, value: Any) -> Any:
        if any(contains_credentials(text) for text in _strings(value)):
            raise ValueError(
                "credentials are not allowed in settings, which are copied into pipelines and reports; remove user, password and "
                "signature from the URL, and pass them in environment variables or files (SECURITY.md)"
            )
        return value

    def canonical_json(self) -> str:
        """JSON with sorted keys: the form in which stages receive their settings, and of which digests are computed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.model_validate_json(text)


def _strings(value: Any) -> Iterator[str]:
    """All strings in the value of one field; nested settings check their own fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _strings(item)
