"""Kill a small pipeline again and again, at any moment, and see whether it still ends with the same models.

    python -m tests.faults --kills 100 --seed 0 --report tests/faults/REPORT.md

The last line is `kills=N resumed=N equal=N lost_steps=N hangs=0 orphans=0`: kills done, kills after which the run went on, kills of
runs whose models equal the undisturbed run's, steps that had been trained and were trained again, attempts that did not end, and
processes that were left behind. Exit code 0 when all are as they should be.
"""

import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from tests.faults.campaign import KINDS, Undisturbed, disturb, prepare


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Markdown file to write.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only these; default all, by turns.")
def main(kills: int, seed: int, report: Path | None, kinds: tuple[str, ...]) -> None:
    started, draws = time.monotonic(), random.Random(seed)
    total: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in kinds or KINDS}
    with tempfile.TemporaryDirectory(prefix="rlhf-faults-") as folder:
        whole: Undisturbed = prepare(Path(folder))
        click.echo(f"undisturbed run: {whole.seconds:.0f} s")
        number = 0
        while total["kills"] < kills:
            number += 1
            run = Path(folder) / f"run-{number}"
            for kind, outcome in disturb(whole, run, draws, kills=kills - total["kills"], kinds=tuple(by_kind)):
                by_kind[kind].update(outcome)
                total.update(outcome)
            click.echo(f"run {number}: {line(total)}")
    if report:
        report.write_text(as_markdown(by_kind, total, seed, time.monotonic() - started), encoding="utf-8")
    click.echo(line(total))
    good = total["kills"] == total["resumed"] == total["equal"] and not total["hangs"] and not total["orphans"]
    sys.exit(0 if good else 1)


def line(total: Counter[str]) -> str:
    return " ".join(f"{name}={total[name]}" for name in ("kills", "resumed", "equal", "lost_steps", "hangs", "orphans"))


def as_markdown(by_kind: dict[str, Counter[str]], total: Counter[str], seed: int, seconds: float) -> str:
    rows = [
        f"| {kind} | {KINDS[kind]} | {n['kills']} | {n['resumed']} | {n['equal']} | {n['lost_steps']} |"
        for kind, n in by_kind.items()
    ]
    return "\n".join(
        [
            "# Fault campaign",
            "",
            f"`python -m tests.faults --kills {total['kills']} --seed {seed}`, {time.strftime('%Y-%m-%d')}, "
            f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, {seconds / 60:.0f} minutes.",
            "",
            "| kind | what is done | kills | went on | same models | steps trained twice |",
            "|---|---|---:|---:|---:|---:|",
            *rows,
            "",
            f"`{line(total)}`",
            "",
        ]
    )


if __name__ == "__main__":
    main(prog_name="python -m tests.faults")
