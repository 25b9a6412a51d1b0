"""The checks beside the judge, with a row for each bound: in an artifact, in sentences and in tables."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from components.rlhf.artifacts.manifest import MAX_BYTES
from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json_as

FILE = "checks.json"


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One bound of one check. value, low and high are what the bound is about; all numbers are 0 if there is a problem."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    check: str  # its name
    item: str = ""  # of several that it measures, such as a task
    unit: str
    num: int = 0  # texts, prompts or samples
    sft: float = 0.0
    policy: float = 0.0
    about: Literal["the policy", "the increase", "the decrease"]
    value: float = 0.0
    low: float = 0.0
    high: float = 0.0
    bound: str  # name of the setting
    limit: float
    passed: bool
    problem: str = ""  # why it could not be measured, as the end of a sentence; such a row has not passed

    @property
    def name(self) -> str:
        return f"{self.check}/{self.item}" if self.item else self.check

    @property
    def interval(self) -> str:
        return "not measured" if self.problem else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def sentence(self) -> str:
        """What is wrong with a row that has not passed, without a full stop."""
        if self.problem:
            return f"check {self.name} gives no verdict, because {self.problem}"
        what = "" if self.about == "the policy" else f"{self.about.removeprefix('the ')} of "
        return f"check {self.name}: {what}{self.interval} {self.unit} breaks {self.bound} {self.limit:g}"


def save_rows(rows: Sequence[CheckRow], folder: Path) -> None:
    """Write checks.json."""
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_rows(folder: Path) -> list[CheckRow]:
    """The rows of an artifact. Raises InputError for anything else, such as a row that has passed without having been measured."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            rows = parse_json_as(TypeAdapter(list[CheckRow]), file.read(MAX_BYTES + 1)[:MAX_BYTES])
        if any(row.passed and row.problem for row in rows):
            raise NotJsonError("a row has passed and was not measured")
        numbers = [value for row in rows for value in asdict(row).values() if isinstance(value, float)]
        if not all(map(math.isfinite, numbers)):
            raise NotJsonError("a number is not finite")
    except (OSError, NotJsonError) as error:
        raise InputError(f"{path} has no rows of checks ({error}); run the stage checks again.") from None
    return rows


def check_numbers(rows: Sequence[CheckRow]) -> dict[str, float]:
    """Metrics: NAME/sft, NAME/policy, and NAME/BOUND with its interval and NAME/BOUND_passed of each row."""
    numbers: dict[str, float] = {}
    for row in rows:
        key = f"{row.name}/{row.bound}"
        numbers[f"{key}_passed"] = float(row.passed)
        if not row.problem:
            numbers |= {f"{row.name}/sft": row.sft, f"{row.name}/policy": row.policy}
            numbers |= {key: row.value, f"{key}_low": row.low, f"{key}_high": row.high}
    return numbers


def check_head(title: str) -> list[str]:
    """The head of a table of checks; title is that of the method that has trained the policy."""
    return ["check", "SFT", title, "bounded", "bound", "result"]


def check_cells(row: CheckRow) -> list[str]:
    """A row of that table."""
    sft, policy = ("", "") if row.problem else (f"{row.sft:.3f}", f"{row.policy:.3f}")
    name = f"{row.name}, {row.unit} (n = {row.num:,})" if row.num else row.name
    bounded = f"{row.about.removeprefix('the ')}: {row.interval}"
    result = "passed" if row.passed else f"failed {row.problem}".strip()
    return [name, sft, policy, bounded, f"{row.bound} {row.limit:g}", result]


def check_table(rows: Sequence[CheckRow], title: str) -> list[str]:
    """The lines of a Markdown table."""
    lines = [check_head(title), ["---", "---:", "---:", "---", "---", "---"], *map(check_cells, rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
