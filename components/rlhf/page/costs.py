"""What the stages of a run took: a table, and the part of a report that is completed when the run has ended."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.rlhf.page.render import FOLDER, render, replace_part
from components.rlhf.text.progress import format_duration

COSTS, SETTINGS = "costs", "settings"  # parts of a report


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage took. None is unknown."""

    stage: str
    seconds: float | None = None
    peak_gib: float | None = None  # the most that one of its processes has held
    planned_gib: float | None = None
    price: float | None = None  # in the currency of the prices per hour


def cost_table(costs: Sequence[StageCost]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, with the sum of the known numbers; a column without any number is left out."""
    seconds, prices = ([c.seconds for c in costs], [c.price for c in costs])
    known_seconds, known_prices = ([v for v in values if v is not None] for values in (seconds, prices))
    columns = {
        "time": [_text(value, "duration") for value in [*seconds, sum(known_seconds) if known_seconds else None]],
        "price": [_text(value, ",.2f") for value in [*prices, sum(known_prices) if known_prices else None]],
        "planned, GiB": [_text(cost.planned_gib, ".2f") for cost in costs] + [""],
        "measured, GiB": [_text(cost.peak_gib, ".2f") for cost in costs]
        + [_text(max((c.peak_gib for c in costs if c.peak_gib is not None), default=None), ".2f")],
        "planned / measured": [
            f"{c.planned_gib / c.peak_gib:.2f}" if c.planned_gib and c.peak_gib else "" for c in costs
        ]
        + [""],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    names = [*(cost.stage for cost in costs), "all" if None not in seconds else "all that is known"]
    return ["stage", *columns], [list(row) for row in zip(names, *columns.values(), strict=True)]


def _text(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return format_duration(value) if form == "duration" else format(value, form)


def costs_part(costs: Sequence[StageCost], *, is_complete: bool) -> str:
    head, rows = cost_table(costs)
    return render(FOLDER / "costs.html", head=head, rows=rows if costs else [], is_complete=is_complete)


def complete(page: str, costs: Sequence[StageCost], params: str) -> str:
    """The report of an evaluation with the costs of all stages and the parameters (YAML) of the run, which the evaluation cannot know."""
    page = replace_part(page, COSTS, costs_part(costs, is_complete=True))
    return replace_part(page, SETTINGS, render(FOLDER / "params.html", params=params))
