"""Both policies of a run beside each other and beside the SFT model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.evaluation.better import Outcome, choose_better, explain
from components.evaluation.compare import Comparison
from components.evaluation.rival import Rival, outcome_of
from components.evaluation.statistics import distinct_2
from components.evaluation.verdict import Decision
from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import comparison_rows
from components.rlhf.text.progress import format_duration

DISTINCT = "distinct-2"
# Measurements of the training of a policy, as the evaluation keeps them beside its own.
SECONDS, PEAK = "policy/seconds", "policy/memory/peak_gib"


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """A table with a row for each number, and which policy goes to the gate."""

    head: list[str]  # of the columns of numbers: SFT and the methods
    rows: list[list[str]]  # name, and a cell for each column
    better: Outcome
    reason: str


def training_costs(policy: Mapping[str, float]) -> dict[str, float]:
    """Time and memory of the training of a policy, from the measurements of its manifest, under the names of an evaluation's."""
    names = {"seconds": SECONDS, "memory/peak_gib": PEAK}
    return {own: policy[name] for name, own in names.items() if name in policy}


def compare_policies(
    comparison: Comparison,
    numbers: Mapping[str, float],
    verdict: Decision,
    costs: Mapping[str, float],
    rival: Rival,
) -> SideBySide:
    """The rival first, because it was evaluated first. costs are those of the policy of the comparison."""
    outcomes = [rival.outcome, outcome_of(comparison.method, verdict.decision, numbers)]
    better = choose_better(outcomes)
    tables = [comparison_rows(rival.numbers), comparison_rows(numbers)]
    names = dict.fromkeys(row["name"] for table in tables for row in table)
    cells = [{row["name"]: row for row in table} for table in tables]
    rows = [["gate", "", *(f"{outcome.decision}" for outcome in outcomes)]]
    for name in names:
        if not name.startswith(DISTINCT):  # of which each table has one at the length of its own responses
            sft = next(own[name]["sft"] for own in cells if name in own)
            rows.append([name, sft, *(own[name]["policy"] if name in own else "" for own in cells)])
    rows.append(_distinct_row(comparison, rival))
    rows += _cost_rows([rival.measurements, costs], [rival.numbers, numbers])
    head = ["SFT", TITLES[rival.method], TITLES[comparison.method]]
    return SideBySide(head=head, rows=rows, better=better, reason=explain(better, outcomes))


def _distinct_row(comparison: Comparison, rival: Rival) -> list[str]:
    """distinct-2 of the three, with the texts of a row cut to the shortest of them."""
    sft, own = ([c.response for c in r.completions] for r in (comparison.sft, comparison.policy))
    return [f"{DISTINCT} at equal length of all", *(f"{value:.3f}" for value in distinct_2(sft, rival.responses, own))]


def _cost_rows(measurements: Sequence[Mapping[str, float]], numbers: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """What each policy took; a row without any number is left out."""

    def row(name: str, values: list[str]) -> list[list[str]]:
        return [[name, "", *values]] if any(values) else []

    return [
        *row("time of its training stage", [format_duration(m[SECONDS]) if SECONDS in m else "" for m in measurements]),
        *row(
            "memory of a process of its training stage, GiB",
            [f"{m[PEAK]:.2f}" if PEAK in m else "" for m in measurements],
        ),
        *row("cost of the judge's answers", [f"{n['judge_cost']:.2f}" if n.get("judge_cost") else "" for n in numbers]),
    ]
