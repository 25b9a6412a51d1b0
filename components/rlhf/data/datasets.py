"""Data sets on disk: one JSONL file a split, and dataset.json with what all records share."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from components.rlhf.config.strict_json import NotJsonError, parse_json
from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText, ValidationSample
from components.rlhf.data.sources import read_jsonl
from components.rlhf.errors import InputError

R = TypeVar("R", Demonstration, PreferencePair, Prompt, RatedText, ValidationSample)
HEADER = "dataset.json"
MAX_HEADER_BYTES = 2**20


def save_dataset(
    directory: Path,
    splits: Mapping[str, Iterable[Demonstration | PreferencePair | Prompt | RatedText]],
    *,
    max_tokens: int,
    counts: Mapping[str, int],
) -> None:
    """Write each split as SPLIT.jsonl, and the header."""
    sizes = {}
    for split, records in splits.items():
        sizes[split] = save_records(directory, split, records)
    header = {"max_tokens": max_tokens, "sizes": sizes, "counts": dict(counts)}
    (directory / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def save_records(
    directory: Path,
    split: str,
    records: Iterable[Demonstration | PreferencePair | Prompt | RatedText | ValidationSample],
) -> int:
    """Write SPLIT.jsonl; return how many records it has."""
    lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records]
    (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def load_records(directory: Path, split: str, record: type[R]) -> list[R]:
    """The records of one split. Raises InputError when there is no such split, or a line of it is no such record."""
    path = directory / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{directory} has no split {split!r}; make the data set again with prepare_data.")
    hints = get_type_hints(record)
    needed = {field.name for field in fields(record)}
    records = []
    for place, row in read_jsonl(path):
        wrong = sorted(set(row) ^ needed) or [name for name, value in row.items() if not _is(value, hints[name])]
        if wrong:
            raise InputError(
                f"{place} is no {record.__name__} (look at {wrong[0][:80]!a}); make the data set again with prepare_data."
            )
        records.append(record(**row))
    return records


def read_header(directory: Path) -> dict[str, Any]:
    """max_tokens (longest prompt and completion together), sizes per split, and the counts of what was dropped.

    Raises InputError when it is not a header that save_dataset wrote.
    """
    path = directory / HEADER
    try:
        with path.open("rb") as file:
            header = parse_json(file.read(MAX_HEADER_BYTES + 1)[:MAX_HEADER_BYTES])
        if not isinstance(header, dict) or set(header) != {"max_tokens", "sizes", "counts"}:
            raise NotJsonError("max_tokens, sizes and counts are needed, and nothing else")
        numbers = [header["max_tokens"], *header["sizes"].values(), *header["counts"].values()]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or header["max_tokens"] == 0:
            raise NotJsonError("a number in it is no count")
    except (OSError, AttributeError, NotJsonError) as error:
        raise InputError(
            f"{path} is not the header of a data set ({error}); make the data set again with prepare_data."
        ) from None
    return header


def _is(value: object, hint: Any) -> bool:
    """Whether a JSON value is of a record's type; a whole number is a float, and true is no number."""
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    return isinstance(value, hint | int if hint in (float, float | None) else hint)
