"""Tables of the results, for the terminal and for benchmarks/README.md."""

from collections.abc import Sequence

from benchmarks.peers.ceiling import rate, share_of_ceiling
from benchmarks.peers.goals import GOALS, AllRows
from benchmarks.peers.rows import Row

GIB = 2**30


def section(name: str, rows: AllRows) -> str:
    """The section of one benchmark: table, machine and versions, and its goals."""
    measured = rows.get(name, ())
    if not measured:
        return "Not measured yet."
    table = {"ceiling": ceiling_table, "growth": growth_table}.get(name)
    lines = [*(table(rows) if table else comparison_table(measured)), "", where(measured)]
    phases = [f"- {phase_shares(row)}" for row in measured if row.get("phases")]
    lines += ["", "Wall time by phase:", "", *phases] if phases else []
    goals = [f"- {goal.state(rows)}" for goal in GOALS[name]]
    return "\n".join([*lines, *(["", "Goals:", "", *goals] if goals else [])])


def comparison_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| setting | system | samples per CPU s | real tokens per CPU s | CPU s per iteration (range, n) | wall s | peak GiB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        for row in (row for row in rows if row["setting"] == setting):
            cpu = row["cpu_seconds"]
            lines.append(
                f"| {setting} | {row['system']} | {row['samples'] / cpu:.2f} | {row['tokens'] / cpu:.1f} | {spread(row)} "
                f"| {row['wall_seconds']:.1f} | {row['peak_bytes'] / GIB:.2f} |"
            )
    return lines


def ceiling_table(rows: AllRows) -> list[str]:
    lines = ["| matrix products | GFLOP per CPU s | CPU s (range, n) |", "|---|---:|---:|"]
    lines += [f"| {row['setting']} | {rate(row):.0f} | {spread(row)} |" for row in rows["ceiling"]]
    lines += [
        "",
        "| iteration | system | GFLOP | GFLOP per CPU s | share of the layers' rate |",
        "|---|---|---:|---:|---:|",
    ]
    for row in [*rows.get("ppo", ()), *rows.get("chat", ())]:
        share = share_of_ceiling(row, rows["ceiling"], "bf16" if "bf16" in row["setting"] else "fp32")
        if share is not None:
            lines.append(f"| {row['setting']} | {row['system']} | {row['gflop']:.0f} | {rate(row):.1f} | {share:.0%} |")
    return lines


def growth_table(rows: AllRows) -> list[str]:
    lines = ["| size | GFLOP | CPU s (range, n) | GFLOP per CPU s | peak GiB |", "|---|---:|---:|---:|---:|"]
    for row in rows["growth"]:
        peak = row["peak_bytes"] / GIB
        lines.append(f"| {row['setting']} | {row['gflop']:.1f} | {spread(row)} | {rate(row):.1f} | {peak:.2f} |")
    return lines


def phase_shares(row: Row) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["phases"].items())
    return f"{row['system']}; {row['setting']}: {shares}"


def spread(row: Row) -> str:
    """The median with its range and number of iterations; more digits for short ones."""
    digits = 1 if row["cpu_seconds"] >= 10 else 2
    median, low, high = (f"{row[f'cpu_seconds{end}']:.{digits}f}" for end in ("", "_min", "_max"))
    return f"{median} ({low} to {high}, {row['n']})"


def where(rows: Sequence[Row]) -> str:
    """Versions, machines, dates and load of all rows."""
    versions = dict.fromkeys(f"{row['system']}: {row['version']}" for row in rows)
    machines = dict.fromkeys(row["machine"] for row in rows)
    dates = sorted({row["date"] for row in rows})
    load = max(row["load"] for row in rows)
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(versions)}. {'; '.join(machines)}; {days}; load before a process at most {load:.1f}. Not measured on a GPU."
