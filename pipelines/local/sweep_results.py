"""The results of a sweep, read while it goes on and afterwards, as a table and as advice."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import format_duration
from pipelines.local.run_dir import IDENTITY_FILE, PARAMS_FILE, read_json, read_state
from pipelines.sweep import short_keys

SWEEP_FILE = "sweep.json"  # written last: a directory without it has no sweep
COLORS = {"promoted": "green", "rejected": "yellow", "failed": "red", "stopped": "yellow", "running": "cyan"}


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A point as its run directory has it. Numbers are those of the evaluation; None before it."""

    name: str
    run: str
    settings: dict[str, str]
    state: str  # waiting, running, succeeded, failed or stopped
    decision: str = ""  # promoted or rejected, once there is an evaluation
    reason: str = ""
    win_rate: float | None = None
    win_rate_low: float | None = None
    win_rate_high: float | None = None
    kl: float | None = None
    seconds: float = 0.0  # of the stages that it did not share with another point
    shared: tuple[str, ...] = ()  # stages


def read_results(folder: Path) -> list[PointResult]:
    """All points: promoted ones first, by their win rate. Raises InputError if the folder has no sweep."""
    results = [_result(folder / name, settings) for name, settings in read_entries(folder).items()]
    return sorted(results, key=_rank)


def _rank(result: PointResult) -> tuple[bool, bool, float, str]:
    return result.decision != "promoted", result.win_rate is None, -(result.win_rate or 0.0), result.name


def read_entries(folder: Path) -> dict[str, dict[str, str]]:
    """Names and settings of the points, in the order of their runs."""
    if not (folder / SWEEP_FILE).is_file():
        raise InputError(f"{folder} contains no sweep (no {SWEEP_FILE}); start one with --out, or correct the path.")
    try:
        return {str(entry["name"]): dict(entry["settings"]) for entry in read_json(folder / SWEEP_FILE)["points"]}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / SWEEP_FILE} cannot be read; start a new sweep.") from None


def _result(run: Path, settings: dict[str, str]) -> PointResult:
    if not (run / IDENTITY_FILE).is_file():
        return PointResult(name=run.name, run=str(run), settings=settings, state="waiting")
    state, summary = read_state(run), read_json(run / "summary.json")
    is_current = state.state == "succeeded"  # else the summary may be of an earlier attempt
    numbers = summary.get("evaluation", {}) if is_current else {}
    stages = summary.get("stages", {}) if is_current else {}
    return PointResult(
        name=run.name,
        run=str(run),
        settings=settings,
        state=state.state,
        decision=("promoted" if summary["promoted"] else "rejected") if numbers else "",
        reason=summary["reason"] if is_current else state.reason,
        **{key: numbers.get(key) for key in ("win_rate", "win_rate_low", "win_rate_high", "kl")},
        seconds=sum(stage["seconds"] for stage in stages.values() if not stage["shared_with"]),
        shared=tuple(name for name, stage in stages.items() if stage["shared_with"]),
    )


CHAMPION_RULE = "of the promoted points, the one with the highest lower end of its win rate's interval"


def champion_of(results: Sequence[PointResult]) -> PointResult | None:
    """The point that CHAMPION_RULE chooses; of equal ones that with the higher win rate, then the lower KL. None if none was promoted.

    The gate has promoted only points whose KL is within gate.max_kl.
    """

    def merit(result: PointResult) -> tuple[float, float, float]:
        assert result.win_rate is not None
        low = result.win_rate if result.win_rate_low is None else result.win_rate_low
        return low, result.win_rate, -(result.kl or 0.0)

    promoted = [result for result in results if result.decision == "promoted" and result.win_rate is not None]
    return max(promoted, key=merit, default=None)


def advice(results: Sequence[PointResult], program: str) -> list[str]:
    """What a user should know of the results: which point is the champion, how far its number can be trusted, and what to do with it."""
    compared = sum(result.win_rate is not None for result in results)
    champion = champion_of(results)
    if not compared:
        return []
    if champion is None:
        best = results[0]
        return [f"No champion: no point was promoted. The best one, {best.name}, was not because: {best.reason}."]
    run, params = shlex.quote(champion.run), shlex.quote(f"{champion.run}/{PARAMS_FILE}")
    lines = [f"Champion: {champion.name} ({CHAMPION_RULE})"]
    if compared > 1:
        lines.append(
            f"It is the best of {compared} on the same held-out prompts, so its win rate is too high on average; measure it on another "
            f"split of the data: {program} run {params} --set seed=N"
        )
    return [
        *lines,
        f"Take it further: {program} export {run} --to my-model, {program} serve {run}, {program} chat {run}",
    ]


def sweep_table(results: Sequence[PointResult]) -> Table:
    """One row per point: its settings, the win rate with its interval, KL, decision, and the time of what it did not share."""
    keys = list(results[0].settings) if results else []
    short = short_keys(keys)
    table = Table(title=f"{len(results)} points", title_justify="left")
    for name in ("point", *(short[key] for key in keys)):
        table.add_column(Text(name), overflow="fold")
    table.add_column("decision")
    for name in ("win rate", "KL", "time", "shared"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        label = result.decision or result.state
        table.add_row(
            result.name.partition("-")[0],
            *(Text(result.settings[key]) for key in keys),
            Text(label, style=COLORS.get(label, "dim")),
            _interval(result),
            "" if result.kl is None else f"{result.kl:.3g}",
            format_duration(result.seconds) if result.seconds else "",
            f"{len(result.shared)} stage{'s' * (len(result.shared) > 1)}" if result.shared else "",
        )
    return table


def _interval(result: PointResult) -> str:
    if result.win_rate is None:
        return ""
    if result.win_rate_low is None or result.win_rate_high is None:
        return f"{result.win_rate:.3f}"
    return f"{result.win_rate:.3f} [{result.win_rate_low:.3f}, {result.win_rate_high:.3f}]"
