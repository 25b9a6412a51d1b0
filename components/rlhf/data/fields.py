"""The fields of a row, under the names that data sets give them."""

import math
from typing import Any

from components.rlhf.data.examples import Unusable
from components.rlhf.data.files import Row

# The names under which data sets have a field; the first one that a row has is taken.
NAMES = {
    "prompt": ("prompt", "instruction", "question", "query"),
    "completion": ("completion", "response", "output", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "input": ("input", "context"),
    "rating": ("rating", "overall_score", "helpfulness", "score"),
    "answers": ("answers", "completions", "responses"),
    "ratings": ("ratings", "scores"),
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating"),
}


class Fields:
    """The fields of one row that are not null, under the names of NAMES. used collects the columns that were asked for and found."""

    def __init__(self, row: Row) -> None:
        self.row = {name: value for name, value in row.items() if value is not None}
        self.used: set[str] = set()

    def get(self, field: str) -> Any:
        for name in NAMES.get(field, (field,)):
            if name in self.row:
                self.used.add(name)
                return self.row[name]
        return None

    def has(self, *fields: str) -> bool:
        return all(any(name in self.row for name in NAMES.get(field, (field,))) for field in fields)

    def text(self, field: str) -> str:
        value = self.get(field)
        if value is None:
            raise self.missing(field)
        if not isinstance(value, str):
            raise Unusable(f"{field} is not text", f"{field} has type {type(value).__name__}; it must be a string.")
        return value

    def number(self, field: str) -> float | None:
        """A finite number, or None if the field is absent or NaN."""
        return self.finite(field, self.get(field))

    def finite(self, field: str, value: Any) -> float | None:
        """The value of a field as a finite number; None for null and NaN."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        try:
            number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise Unusable(f"{field} is not a number", f"{field} is {str(value)[:80]!r}; it must be a finite number.")
        return number

    def missing(self, field: str, advice: str = "map it in columns or correct the data") -> Unusable:
        found = ", ".join(self.row) or "none"
        return Unusable(f"no field {field!r}", f"no field {field!r} (found: {found[:200]}); {advice}.")


def nearest(fields: Fields, section: str) -> str:
    """What a row that cannot be read most resembles, and what to do with it."""
    if "text" in fields.row and section == "prompts":
        return "set columns: {prompt: text}"
    if "text" in fields.row:
        return "a text alone has no prompt; split it into prompt and completion"
    if section == "preferences" and fields.has("completion"):
        return (
            "an answer alone is no preference; add a second one as chosen and rejected, or a rating or a label for each"
        )
    if section == "demonstrations" and fields.has("answers"):
        return "choose the answer to learn, and save it as completion"
    return "map it in columns or correct the data"
