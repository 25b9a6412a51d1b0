"""docs/scale.md has the tables that the planner computes now."""

import re

from benchmarks.planner.__main__ import GOAL, rows
from benchmarks.scale import PAGE, sections


def test_tables_of_the_page_are_fresh() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, text in sections():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
        assert found, f"docs/scale.md has no section {name}"
        assert found[1].strip() == text.strip(), f"run python -m benchmarks.scale: {name} is not up to date"


def test_plans_are_within_15_percent_of_every_recorded_measurement() -> None:
    far = {
        name: ratio
        for _, size, label, *_, ratio in rows()
        if abs(float(ratio) - 1) > GOAL
        for name in [f"{size} {label}"]
    }
    assert not far
    assert len(rows()) > 20
