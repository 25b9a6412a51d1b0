"""Data sets on disk: one JSONL file a split, and dataset.json with what all records share."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText, ValidationSample
from components.rlhf.errors import InputError

R = TypeVar("R", Demonstration, PreferencePair, Prompt, RatedText, ValidationSample)
HEADER = "dataset.json"


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
    """The records of one split. Raises InputError when the data set has no such split."""
    path = directory / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"{directory} has no split {split!r}; make the data set again with prepare_data.")
    with path.open(encoding="utf-8") as file:
        return [record(**json.loads(line)) for line in file]


def read_header(directory: Path) -> dict[str, Any]:
    """max_tokens (longest prompt and completion together), sizes per split, and the counts of what was dropped."""
    header: dict[str, Any] = json.loads((directory / HEADER).read_text(encoding="utf-8"))
    return header
