"""The reference of all parameters, written from the settings models, so that it cannot be out of date."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from components.rlhf.config.params import Params

TARGET = Path(__file__).parent / "params" / "README.md"
HEAD = """# Parameters

Every parameter of a params file, with its default. Change one on the command line with `--set ppo.kl_coef=0.1`. What is not
listed here is an error, with the nearest valid name. This page is written by `make compile`.

Params files in this folder: [movie_reviews.yaml](movie_reviews.yaml).
"""


def as_markdown() -> str:
    lines = [HEAD, "| parameter | default | what it is |", "|---|---|---|"]
    lines += [f"| `{name}` | {_default(field)} | {field.description} |" for name, field in _leaves(Params, "")]
    return "\n".join(lines) + "\n"


def _leaves(model: type[BaseModel], prefix: str) -> list[tuple[str, FieldInfo]]:
    """Every field that holds a value, in the order of the models, with its dotted name."""
    found = []
    for name, field in model.model_fields.items():
        nested = next((t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        found += _leaves(nested, f"{prefix}{name}.") if nested else [(prefix + name, field)]
    return found


def _types(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *get_args(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "`{}`"
    return f"`{json.dumps(field.default)}`"
