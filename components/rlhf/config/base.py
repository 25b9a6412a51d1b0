"""What all settings share: strict, immutable, and one canonical JSON text.

Law of this room: pydantic only. Nothing here reads a file, an environment variable or a device.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.rlhf.text.credentials import contains_credentials

PositiveInt = Annotated[int, Field(ge=1, lt=2**53)]  # JSON's numbers are exact up to there
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class BaseConfig(BaseModel):
    """Unknown keys are errors and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        if any(contains_credentials(text) for text in _texts(value)):
            raise ValueError(
                "credentials do not belong here: settings are copied into pipelines and reports; leave user, password and signature out "
                "of the address, and give them by environment variables or files (SECURITY.md)"
            )
        return value

    def canonical_json(self) -> str:
        """The one text that stands for these settings: it travels between stages as a string, and digests are of it."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.model_validate_json(text)


def _texts(value: Any) -> Iterator[str]:
    """The texts of one field; nested settings look at their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _texts(inner)
