"""Texts that name something in Kubernetes, which refuses others only when a pod is created.

The rules are those of https://kubernetes.io/docs/concepts/overview/working-with-objects/names and .../labels.
"""

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

PART = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{PART}(\.{PART})*"
WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"


def as_text(value: object) -> object:
    """Convert booleans and numbers, as which YAML parses labels such as true and 22000, to strings."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _matches(pattern: str, what: str, example: str, *, limit: int = 253) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value) or len(value) > limit:
            raise ValueError(f"{value[:80]!r} is no {what} of Kubernetes; write one like {example}")
        return value

    return check


Text = Annotated[str, BeforeValidator(as_text)]
ObjectName = Annotated[str, AfterValidator(_matches(SUBDOMAIN, "name", "team-data"))]
LabelKey = Annotated[str, AfterValidator(_matches(rf"({SUBDOMAIN}/)?{WORD}", "label", "example.com/pool", limit=317))]
LabelValue = Annotated[
    str, BeforeValidator(as_text), AfterValidator(_matches(rf"({WORD})?", "value of a label", "a100-80gb", limit=63))
]
VariableName = Annotated[str, AfterValidator(_matches(r"[A-Za-z_][A-Za-z0-9_]*", "environment variable", "NCCL_DEBUG"))]
Image = Annotated[
    str, AfterValidator(_matches(r"[a-z0-9][\w.:/@-]*", "image", "registry.example.com/team/trainer:0.1.0", limit=500))
]
