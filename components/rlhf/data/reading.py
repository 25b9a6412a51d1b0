"""Reads a source as examples, and decides whether a run renders its sources with the chat template."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from components.rlhf.config.prepare_data import DataConfig, DataSource
from components.rlhf.data.examples import Example, Unusable
from components.rlhf.data.fields import Fields
from components.rlhf.data.shapes import CONVERTERS
from components.rlhf.data.sources import SourceRow, read_rows
from components.rlhf.data.tally import Tally
from components.rlhf.text.errors import InputError


def section_of(key: str) -> str:
    """The section of a source's key, such as prompts for data.prompts.1."""
    return key.split(".")[1]


def source_name(key: str, source: DataSource) -> str:
    return f"{key} ({source.path})"


def read_examples(
    section: str, source: DataSource, tally: Tally, *, max_rows: int | None = None
) -> Iterator[tuple[str, Example]]:
    """Yield (location, example) of every usable row, or of the first max_rows; count all of them in tally, except those kept.

    Raises InputError for a row that cannot be read at all, such as a line that is not JSON.
    """
    used: set[str] = set()
    columns: set[str] = set()
    for found in islice(read_rows(source), max_rows):
        location, fields = found.location, Fields(found.row)
        used.update(name.split(".")[0] for name in source.keep)
        try:
            kept = kept_columns(source.keep, found)
            for example in CONVERTERS[section](fields):
                tally.read += 1
                if isinstance(example, Unusable):
                    tally.drop(example, location)
                    continue
                if example.changed:
                    tally.changed[example.changed] += 1
                yield location, replace(example, columns=kept) if kept else example
        except Unusable as error:
            tally.read += 1
            tally.drop(error, location)
        columns.update(fields.row)
        used.update(fields.used)
    tally.unread_columns = columns - used


def kept_columns(names: Sequence[str], found: SourceRow) -> dict[str, str]:
    """The columns that a prompt keeps: text as it is, anything else as its JSON text. Raises Unusable for a missing or empty one."""
    kept = {}
    for name in names:
        value = found.kept.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            problem = (
                "is empty" if name in found.kept else f"is missing (found: {', '.join(found.row)[:200] or 'none'})"
            )
            raise Unusable(
                f"no column {name!r} to keep",
                f"the column {name!r}, which keep names, {problem}; correct keep or the data.",
            )
        try:
            kept[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError):
            raise Unusable(
                f"the column {name!r} cannot be kept",
                f"the column {name!r} has a {type(value).__name__}, which is no JSON value; save it as text.",
            ) from None
    return kept


def uses_chat_template(
    data: DataConfig, keyed: Mapping[str, DataSource], *, has_template: bool | None, max_rows: int | None = None
) -> bool:
    """Whether the sources of a run are rendered with the chat template, all of them alike.

    keyed are the sources of data that can be read; has_template says whether the tokenizer has a chat template, None if that is
    not known yet. Raises InputError, with the names of the sources, if they cannot be rendered alike as data.template says.
    """
    movies = [source_name(key, source) for key, source in keyed.items() if source.format == "movie_ratings"]
    if movies and data.template == "chat":
        raise InputError(
            f"{movies[0]} has beginnings of texts to continue, which are no chat; set data.template to plain."
        )
    chats = _source_where(keyed, is_text=False, max_rows=max_rows) if data.template != "chat" else None
    if chats and movies:
        raise InputError(
            f"{chats} holds messages and {movies[0]} beginnings of texts to continue, which cannot be rendered alike; "
            "use sources of one kind."
        )
    if chats and data.template == "plain":
        text = _source_where(keyed, is_text=True, max_rows=max_rows)
        other = f" and {text} plain texts" if text else ""
        raise InputError(
            f"{chats} holds messages{other}, and data.template is plain, which cannot render messages; set it to chat."
        )
    is_chat = data.template == "chat" or chats is not None
    if is_chat and has_template is False:
        reason = f"{chats} holds messages" if chats else "data.template is chat"
        raise InputError(
            f"{reason}, but the base model's tokenizer has no chat template; use plain texts with data.template: plain, or a "
            "model with a template."
        )
    return is_chat


def _source_where(keyed: Mapping[str, DataSource], *, is_text: bool, max_rows: int | None) -> str | None:
    """Name of the first source with an example of that kind in its first max_rows."""
    for key, source in keyed.items():
        if source.format != "movie_ratings":
            for _, example in read_examples(section_of(key), source, Tally(name=key), max_rows=max_rows):
                if example.is_text == is_text:
                    return source_name(key, source)
    return None
