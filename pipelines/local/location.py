"""Paths below a run directory, recognized in the JSON of commands and outputs, so that a stage is the same wherever its run is."""

import json
import re
from pathlib import Path
from typing import Any

PLACE = "below the run directory"  # the key that stands for such a path; no setting has it


def without_location(value: Any, run: Path) -> Any:
    """The value with an object in place of each string that is a path, or a URI of a path, at or below the run directory.

    An object cannot be mistaken for a string that somebody wrote. Paths in JSON within strings count too; other strings stay as they
    are, also those that contain the path in the middle or only begin with the same letters.
    """
    if isinstance(value, dict):
        return {key: without_location(inner, run) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_location(inner, run) for inner in value]
    if not isinstance(value, str):
        return value
    if found := _split(value, run):
        return {PLACE: list(found)}
    if value.lstrip().startswith(("{", "[")):
        try:
            content = json.loads(value)
        except ValueError:
            return value
        general = without_location(content, run)
        return value if general == content else general
    return value


def moved(value: Any, old: Path, new: Path) -> Any:
    """The value with the paths at or below the directory old as paths of the directory new."""
    if isinstance(value, dict):
        return {key: moved(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [moved(inner, old, new) for inner in value]
    found = _split(value, old) if isinstance(value, str) else None
    return f"{found[0]}{new}{found[1]}" if found else value


def _split(text: str, run: Path) -> tuple[str, str] | None:
    """Scheme and rest of a path or URI at or below the run directory; sqlite has a slash more than file (sqlite:////run/x.db)."""
    match = re.fullmatch(rf"((?:[a-z][a-z0-9+.-]*:///?)?){re.escape(str(run))}((?:/.*)?)", text, re.DOTALL)
    return (match[1], match[2]) if match else None
