"""Runs side by side: the parameters that differ, what was measured, and what it took."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import format_duration
from pipelines.local.run_dir import find_run, read_json, read_params

NOT_COMPARED = ("tracking.", "storage.")  # where results are, not what they are
MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tables of N runs: each row has a name and N values."""

    runs: list[str]
    parameters: list[list[str]]  # only those that differ
    results: list[list[str]]
    stages: list[list[str]]  # times


def compare_runs(runs: Sequence[Path]) -> Comparison:
    """Compare finished runs. Raises InputError for a folder without a run, and for a run without a summary."""
    summaries = [_summary(find_run(run)) for run in runs]
    return Comparison(
        runs=_short_names(runs),
        parameters=list(_differences([dict(_flatten(read_params(run))) for run in runs])),
        results=_results(summaries),
        stages=_stages(summaries),
    )


def _summary(run: Path) -> dict[str, Any]:
    summary = read_json(run / "summary.json")
    if not summary.get("evaluation_all"):
        raise InputError(
            f"{run} has no evaluation to compare; kfp-rlhf status {run} says why, and kfp-rlhf run --resume {run} goes on."
        )
    return summary


def _short_names(runs: Sequence[Path]) -> list[str]:
    """The names of the folders, or their paths where two have the same name."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of nested parameters; an empty mapping has none, and a list of values is one value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from _flatten(inner, f"{key}.{number}")
    else:
        yield key, MISSING if value is None else str(value)


def _differences(parameters: Sequence[Mapping[str, str]]) -> Iterator[list[str]]:
    for key in dict.fromkeys(key for values in parameters for key in values):
        values = [each.get(key, MISSING) for each in parameters]
        if len(set(values)) > 1 and not key.startswith(NOT_COMPARED):
            yield [key, *values]


def _results(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = [
        {row["name"]: row["policy"] for row in comparison_rows(summary["evaluation_all"])} for summary in summaries
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, MISSING) for column in columns)] for name in names]
    decisions = ["promoted" if summary["promoted"] else "rejected" for summary in summaries]
    return [["decision", *decisions], *rows]


def _stages(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = dict.fromkeys(name for summary in summaries for name in summary["stages"])
    rows = []
    for name in names:
        stages = [summary["stages"].get(name) for summary in summaries]
        rows.append([name, *(format_duration(stage["seconds"]) if stage else MISSING for stage in stages)])
    totals = [sum(stage["seconds"] for stage in summary["stages"].values()) for summary in summaries]
    return [*rows, ["sum", *map(format_duration, totals)]]


def as_markdown(comparison: Comparison) -> str:
    parts = [_markdown_table(name, rows, comparison.runs) for name, rows in sections(comparison)]
    return "\n".join(parts)


def sections(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of each table that has rows."""
    found = [
        ("Results", comparison.results),
        ("Parameters that differ", comparison.parameters),
        ("Time of each stage", comparison.stages),
    ]
    return [(name, rows) for name, rows in found if rows]


def _markdown_table(title: str, rows: list[list[str]], runs: list[str]) -> str:
    lines = [["", *runs], ["---"] * (len(runs) + 1), *rows]
    cells = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]
    return "\n".join([f"## {title}", "", *cells, ""])


def as_html(comparison: Comparison) -> str:
    """A page that needs no network."""
    from jinja2 import Environment

    template = Path(__file__).with_name("compare.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(runs=comparison.runs, sections=sections(comparison))
