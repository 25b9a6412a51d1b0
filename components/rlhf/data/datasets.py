"""Data sets on disk: one JSONL file per split, and dataset.json with their common metadata."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter

from components.rlhf.data.files import read_jsonl
from components.rlhf.data.records import Demonstration, LabeledText, PreferencePair, Prompt, RatedText, ValidationSample
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as

R = TypeVar("R", Demonstration, LabeledText, PreferencePair, Prompt, RatedText, ValidationSample)
Count = Annotated[int, Field(ge=0)]
HEADER = "dataset.json"
COLUMNS = "columns"  # the only field that a row may lack
MAX_HEADER_BYTES = 2**20


def save_dataset(
    directory: Path,
    splits: Mapping[str, Iterable[Demonstration | LabeledText | PreferencePair | Prompt | RatedText]],
    *,
    max_tokens: int,
    counts: Mapping[str, int],
) -> None:
    """Write each split as SPLIT.jsonl, and the metadata as dataset.json."""
    sizes = {}
    for split, records in splits.items():
        sizes[split] = save_records(directory, split, records)
    header = {"max_tokens": max_tokens, "sizes": sizes, "counts": dict(counts)}
    (directory / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def save_records(
    directory: Path,
    split: str,
    records: Iterable[Demonstration | LabeledText | PreferencePair | Prompt | RatedText | ValidationSample],
) -> int:
    """Write SPLIT.jsonl and return the number of records."""
    lines = [json.dumps(as_row(record), ensure_ascii=False) + "\n" for record in records]
    (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def as_row(record: object) -> dict[str, Any]:
    """The fields of a record, without the columns of a prompt that has none."""
    return asdict(record, dict_factory=_without_empty_columns)  # type: ignore[call-overload, no-any-return]


def _without_empty_columns(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name != COLUMNS or value}


def load_records(directory: Path, split: str, record: type[R]) -> list[R]:
    """The records of one split. Raises InputError when the split is missing or one of its lines is not such a record."""
    path = directory / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{directory} has no split {split!r}; run prepare_data again.")
    validator, names = TypeAdapter(record), {field.name for field in fields(record)}
    records = []
    for location, row in read_jsonl(path):
        try:
            for name in sorted((row.keys() | {COLUMNS} & names) ^ names):
                raise NotJsonError(f"{name[:80]!a} is {'missing' if name in names else 'not a field'}")
            records.append(parse_json_as(validator, json.dumps(row)))
        except NotJsonError as error:
            raise InputError(
                f"{location} is not a valid {record.__name__} ({error}); run prepare_data again."
            ) from None
    return records


@dataclass(frozen=True, kw_only=True)
class DatasetHeader:
    """Metadata of a data set: the content of dataset.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    max_tokens: Annotated[int, Field(gt=0)]  # maximum length of prompt and completion together
    sizes: dict[str, Count]  # records per split
    counts: dict[str, Count]  # records read, kept, and dropped by reason


def read_header(directory: Path) -> DatasetHeader:
    """The header that save_dataset wrote. Raises InputError when it is missing or invalid."""
    path = directory / HEADER
    try:
        with path.open("rb") as file:
            return parse_json_as(TypeAdapter(DatasetHeader), file.read(MAX_HEADER_BYTES + 1)[:MAX_HEADER_BYTES])
    except (OSError, NotJsonError) as error:
        raise InputError(f"{path} is not a valid data set header ({error}); run prepare_data again.") from None
