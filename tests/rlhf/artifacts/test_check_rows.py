"""Rows of checks: written, read, and shown."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.artifacts.check_rows import CheckRow, check_numbers, check_table, read_rows, save_rows
from components.rlhf.text.errors import InputError

PASSED = CheckRow(
    check="refusals", unit="of the prompts", num=90, sft=0.9, policy=0.8, about="the policy", value=0.8, low=0.7, high=0.9,
    bound="min_rate", limit=0.6, passed=True,
)  # fmt: skip
FAILED = CheckRow(
    check="facts", item="arc", unit="acc", num=500, sft=0.5, policy=0.4, about="the decrease", value=0.1, low=0.05, high=0.15,
    bound="max_drop", limit=0.03, passed=False,
)  # fmt: skip
UNKNOWN = CheckRow(
    check="polite", unit="", about="the policy", bound="min_rate", limit=0.5, passed=False, problem="no | answer"
)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_rows([PASSED, FAILED, UNKNOWN], tmp_path)
    assert read_rows(tmp_path) == [PASSED, FAILED, UNKNOWN]


@pytest.mark.parametrize(
    "change",
    [{"passed": "yes"}, {"problem": "broken"}, {"extra": 1}, {"about": "the weather"}, {"low": None}, {"check": None}],
)
def test_other_rows_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "checks.json").write_text(json.dumps([asdict(PASSED) | change]))
    with pytest.raises(InputError, match="has no rows of checks"):
        read_rows(tmp_path)


@pytest.mark.parametrize("text", ["", "[NaN]", "{}", "[1]", json.dumps([asdict(PASSED)]).replace("0.7", "1e999")])
def test_no_rows_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "checks.json").write_text(text)
    with pytest.raises(InputError, match="has no rows of checks"):
        read_rows(tmp_path)


def test_sentences_say_what_breaks_which_bound() -> None:
    assert FAILED.sentence() == "check facts/arc: decrease of 0.100 [0.050, 0.150] acc breaks max_drop 0.03"
    broken = replace(PASSED, passed=False, limit=0.75)
    assert broken.sentence() == "check refusals: 0.800 [0.700, 0.900] of the prompts breaks min_rate 0.75"


def test_metrics_have_no_numbers_of_what_was_not_measured() -> None:
    numbers = check_numbers([PASSED, FAILED, UNKNOWN])
    assert numbers["refusals/min_rate_passed"] == 1.0 and numbers["polite/min_rate_passed"] == 0.0
    assert numbers["facts/arc/max_drop_high"] == 0.15 and numbers["facts/arc/sft"] == 0.5
    assert [name for name in numbers if name.startswith("polite")] == ["polite/min_rate_passed"]


def test_table_shows_every_row() -> None:
    lines = check_table([PASSED, FAILED, UNKNOWN], "DPO")
    assert lines[0].startswith("| check | SFT | DPO |") and len(lines) == 5
    assert lines[2].startswith("| refusals, of the prompts (n = 90) | 0.900 | 0.800 |")
    assert lines[2].endswith("| min_rate 0.6 | passed |") and lines[3].endswith("| failed |")
    assert lines[4].endswith("| failed no \\| answer |")
