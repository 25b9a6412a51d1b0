"""Drops unusable records, counts them by reason, and rejects a source with too many of them."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from components.rlhf.data.records import Demonstration, PreferencePair, Prompt, RatedText
from components.rlhf.text.errors import InputError

Record = Demonstration | PreferencePair | Prompt | RatedText
R = TypeVar("R", Demonstration, PreferencePair, Prompt, RatedText)
MIN_USABLE = 0.8


def clean(name: str, records: Iterable[R]) -> tuple[list[R], Counter[str]]:
    """Return the usable records in their order, and counts: read, kept, and dropped by reason.

    Drops records with an empty text, duplicates, and pairs whose chosen text equals the rejected one. Raises InputError
    when no records, or less than 80% of them, are usable: the usual cause is a wrong column name.
    """
    kept: list[R] = []
    counts: Counter[str] = Counter()
    seen: set[tuple[object, ...]] = set()
    for record in records:
        counts["read"] += 1
        reason = _defect(record)
        texts = _texts(record)
        if reason is None and texts in seen:
            reason = "duplicate"
        if reason is None:
            seen.add(texts)
            kept.append(record)
        else:
            counts[f"dropped_{reason}"] += 1
    counts["kept"] = len(kept)
    if len(kept) < MIN_USABLE * counts["read"] or not kept:
        dropped = ", ".join(
            f"{n} {key.removeprefix('dropped_')}" for key, n in counts.items() if key.startswith("dropped_")
        )
        raise InputError(
            f"{name}: only {len(kept)} of {counts['read']} records are usable ({dropped or 'the source is empty'}); "
            f"at least {MIN_USABLE:.0%} must be. Correct the data, or columns in the params file."
        )
    return kept, counts


def _texts(record: Record) -> tuple[object, ...]:
    """The texts that identify a record, whitespace normalized. Records that differ only in margin or rating are duplicates."""
    values = (
        getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in ("id", "margin", "rating", "messages")
    )
    return tuple(" ".join(value.split()) for value in values)


def _defect(record: Record) -> str | None:
    texts = _texts(record)
    if not all(texts):
        return "empty"
    if isinstance(record, PreferencePair) and texts[1] == texts[2]:
        return "chosen_equals_rejected"
    return None
