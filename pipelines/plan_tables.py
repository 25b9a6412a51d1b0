"""What `kfp-rlhf plan` prints: tables of memory, parts, time and price, and checkpoints."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.rlhf.planner.phases import GIB
from components.rlhf.planner.plan import shortfall
from components.rlhf.planner.saving import lost_share
from components.rlhf.planner.speeds import speed_of
from components.rlhf.planner.suggest import suggest
from components.rlhf.text.progress import format_duration
from pipelines.plan import RunPlan

STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red", "unknown": "dim"}
LEFT = ("stage", "in", "peak", "verdict")  # other columns that do not hold numbers


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as text."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    wrapped: tuple[str, ...] = ()  # columns that a narrow screen breaks into lines


def grids(plan: RunPlan) -> Iterator[Grid]:
    yield _memory(plan)
    yield _parts(plan)
    yield _time(plan)
    if plan.saves:
        yield _checkpoints(plan)


def _memory(plan: RunPlan) -> Grid:
    rows = []
    for stage, found in plan.stages.items():
        machine, (_, device) = plan.machines[stage], found.device_peak()
        rows.append(
            [
                stage,
                plan.profile_name(stage),
                f"{found.pods} x {found.processes_per_pod}",
                f"{device / GIB:.1f} of {_gib(machine.gpu_memory)}" if found.on_gpu else "",
                f"{found.pod_memory() / GIB:.1f} of {_gib(machine.memory)}",
                plan.verdicts[stage].text,
            ]
        )
    head = ("stage", "profile", "pods x ranks", "GPU GiB", "main GiB", "verdict")
    return Grid(title="Memory of a GPU, and main memory of a pod", head=head, rows=rows, wrapped=("profile",))


def _parts(plan: RunPlan) -> Grid:
    """What the peaks of each stage consist of: on a GPU, and in main memory."""
    rows = []
    for stage, found in plan.stages.items():
        places = [("GPU", found.device_peak()[0])] if found.on_gpu else []
        for place, phase in [*places, ("main", found.main_peak()[0])]:
            parts = found.parts(phase, main=place == "main")
            large = [f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= sum(parts.values()) / 50]
            rows.append([stage, place, phase, ", ".join(large)])
    head = ("stage", "in", "peak", "parts")
    return Grid(title="What the peaks consist of (GiB of a process)", head=head, rows=rows, wrapped=("parts",))


def _time(plan: RunPlan) -> Grid:
    rows, prices = [], []
    for stage in plan.stages:
        found, price = plan.seconds[stage], plan.price(stage)
        prices.append(price)
        total = max(found.total, 1e-9)
        shares = [f"{name} {seconds / total:.0%}" for name, seconds in found.parts.items() if seconds / total >= 0.01]
        text = "unknown" if price is None else f"{price:,.2f}"
        rows.append([stage, format_duration(found.total), text, ", ".join(shares)])
    known = [price for price in prices if price is not None]
    total_price = f"{sum(known):,.2f}" if len(known) == len(prices) else f"{sum(known):,.2f} and unknown"
    total_time = format_duration(sum(plan.seconds[stage].total for stage in plan.stages))
    rows.append(["all", total_time, total_price if known else "unknown", ""])
    return Grid(
        title="Time and price", head=("stage", "time", "price", "of the time"), rows=rows, wrapped=("of the time",)
    )


def _checkpoints(plan: RunPlan) -> Grid:
    rows = []
    for saves in plan.saves:
        hours = plan.hours_between_losses(saves.stage)
        minutes = saves.minutes(hours)
        lost = lost_share(60 * minutes, saves.stall_seconds, 3600 * hours)
        rows.append(
            [
                saves.stage,
                f"{saves.total_bytes / 1e9:,.1f}",
                f"{saves.stall_seconds:.1f}",
                f"{saves.write_seconds:,.0f}",
                f"{hours:,.0f}",
                f"{minutes:.0f}",
                f"{lost:.2%}",
            ]
        )
    head = ("stage", "GB", "wait, s", "write, s", "loss, h", "every, min", "lost")
    return Grid(title="Checkpoints", head=head, rows=rows)


def notes(plan: RunPlan) -> Iterator[str]:
    """What is assumed, and what to turn where a stage does not fit."""
    shape = plan.shapes.base
    counted = "counted in the headers of its files" if shape.exact else "estimated from config.json"
    yield f"{shape.name}: {shape.total:,} parameters, {counted}."
    for stage, verdict in plan.verdicts.items():
        if verdict.text == "does not fit":
            machine, where = plan.machines[stage], f"the profile {plan.profile_name(stage)}"
            options = suggest(plan.params, plan.shapes, stage)
            turn = f"it fits with {', '.join(options)}" if options else "no setting that was tried makes it fit"
            yield f"{shortfall(plan.stages[stage], machine, where)}; {turn}."
    speeds = {
        speed_of(plan.machines[stage].gpu_memory, on_gpu=plan.stages[stage].on_gpu).sentence() for stage in plan.stages
    }
    yield f"Times are estimates for texts of the greatest length, not measured: {'; '.join(sorted(speeds))}."
    for stage, found in plan.stages.items():
        yield from (f"{stage}: {note}." for note in (*found.notes, plan.seconds[stage].note) if note)
    minutes = plan.every_minutes()
    if minutes is not None:
        yield (
            f"Checkpoints: training waits while a save is copied, and a node writes {plan.options.megabytes_per_second:.0f} MB/s beside it "
            f"and is lost every {plan.options.mtbf_hours:,.0f} hours; the interval is sqrt(2 x wait x time between losses), but no shorter "
            "than a save takes to write (Young, Daly). For the stage that takes longest:"
        )
        yield f"--set checkpoint.every_minutes={minutes}"


def print_plan(plan: RunPlan, console: Console) -> None:
    for grid in grids(plan):
        # Without lines between columns, so that no name and no number is cut at 80 characters.
        table = Table(
            title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
        )
        for name in grid.head:
            wrapped = name in grid.wrapped
            is_text = wrapped or name in LEFT
            table.add_column(name, justify="left" if is_text else "right", no_wrap=not wrapped, overflow="fold")
        for row in grid.rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        console.print(table)
        console.print()
    for note in notes(plan):
        console.print(Text(note), soft_wrap=True)


def as_markdown(plan: RunPlan) -> str:
    parts = []
    for grid in grids(plan):
        lines = [f"**{grid.title}**", "", f"| {' | '.join(grid.head)} |", "|---" * len(grid.head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(plan))]) + "\n"


def as_json(plan: RunPlan) -> str:
    """Everything in bytes and seconds."""
    content: dict[str, Any] = {
        "model": asdict(plan.shapes.base) | {"linears": len(plan.shapes.base.linears), "total": plan.shapes.base.total},
        "stages": {},
    }
    for stage, found in plan.stages.items():
        content["stages"][stage] = {
            "profile": plan.profile_name(stage),
            "num_processes": found.num_processes,
            "pods": found.pods,
            "verdict": plan.verdicts[stage].text,
            "gpu_bytes": found.device_peak()[1],
            "pod_bytes": found.pod_memory(),
            "phases": [asdict(phase) for phase in found.phases],
            "seconds": dict(plan.seconds[stage].parts),
            "price": plan.price(stage),
        }
    content["checkpoints"] = [asdict(saves) for saves in plan.saves]
    return json.dumps(content, indent=2) + "\n"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.0f}"
