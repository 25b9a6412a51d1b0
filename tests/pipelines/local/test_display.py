"""Runs side by side in terminals of two widths."""

import io

import pytest
from rich.console import Console

from pipelines.local.compare import Comparison
from pipelines.local.display import print_comparison

NAME = "win rate at equal length and ending (256 responses)"
VALUE = "0.512 [0.450, 0.570]"


@pytest.mark.parametrize(("width", "is_narrow"), [(80, True), (120, False)])
def test_values_of_three_runs_stay_whole(width: int, is_narrow: bool) -> None:
    rows = [[f"{NAME}", VALUE, VALUE, VALUE], ["win rate (judge), [95% interval]", VALUE, VALUE, VALUE]]
    comparison = Comparison(runs=["one", "[two]", "three"], parameters=[], results=rows, stages=[])
    console = Console(width=width, file=io.StringIO())
    print_comparison(comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    values = [row[1:] for row in cells if any(row[1:])]
    parts = ["0.512", "[0.450, 0.570]"] if is_narrow else [VALUE]
    assert values == [[part] * 3 for part in parts] * 2
    names = " ".join(row[0] for row in cells)
    assert " ".join(names.split()) == " ".join(row[0] for row in rows)
    assert "[two]" in text
