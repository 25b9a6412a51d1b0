"""The reference of all parameters, written from the settings models, so that it cannot be out of date."""

import json
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from components.rlhf.config.params import Params

TARGET = Path(__file__).parent / "params" / "README.md"
HEAD = """# Parameters

Every parameter of a params file, with its default. Change one on the command line with `--set ppo.kl_coef=0.1`. What is not
listed here is an error, with the nearest valid name. This page is written by `make compile`.

A file may also hold `presets`: sections by name, laid over the file's own key by key. `preset` chooses one (`--set preset=full`,
`make run PRESET=full`); other changes on the command line come after it. In a file without presets, `preset` is only a name.

`cluster.profiles.NAME` lays changes over the profile of that name that comes with this, or makes a new one, which may start from
another: `like: gpu-80gb`. Where a stage has accelerators, its `training.num_processes` is their number. The profiles:
[pipelines/README.md](../README.md).

Params files in this folder: [movie_reviews.yaml](movie_reviews.yaml) (presets quick and full).
"""


def as_markdown() -> str:
    lines = [HEAD, "| parameter | default | what it is |", "|---|---|---|"]
    lines += [f"| `{name}` | {default} | {sentence} |" for name, default, sentence in leaves(Params, "")]
    return "\n".join(lines) + "\n"


def leaves(model: type[BaseModel], prefix: str, section: BaseModel | None = None) -> list[tuple[str, str, str]]:
    """Dotted name, default and sentence of every field that holds a value. section holds the defaults where they differ."""
    found = []
    for name, field in model.model_fields.items():
        default = getattr(section, name) if section else field.default
        nested = next((t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if nested:
            inside = {dict: ".NAME", tuple: "[]"}.get(get_origin(_plain(field.annotation)), "")
            found += leaves(nested, f"{prefix}{name}{inside}.", default if isinstance(default, BaseModel) else None)
        else:
            found.append((prefix + name, _shown(default, field), field.description or ""))
    return found


def _types(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *get_args(annotation))


def _plain(annotation: Any) -> Any:
    """The type itself, without what Annotated adds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _shown(default: Any, field: FieldInfo) -> str:
    if default is PydanticUndefined:
        return "required" if field.default_factory is None else "`{}`"
    return f"`{json.dumps(default)}`"
