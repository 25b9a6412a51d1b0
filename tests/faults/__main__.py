"""Kill a small pipeline repeatedly, at random moments, and check that it still produces the same models.

    python -m tests.faults --kills 100 --seed 0 --jobs 2 --report tests/faults/REPORT.md

The last line is `kills=N resumed=N equal=N lost_steps=N hangs=0 orphans=0`: kills, kills after
which the run resumed, kills of runs with the models of the undisturbed run, steps that were trained twice, attempts that hung, and
processes that were left behind. The exit code is 0 if all are as expected.
"""

import contextlib
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import click

from tests.faults.campaign import IN_A_FOLDER, KINDS, ON_A_SMALL_DISK, WITH_SERVICES, Outcome, disturb, prepare
from tests.faults.places import FolderPlace, Services, SmallDisk
from tests.support.resident import Resident

MAX_KILLS_PER_RUN = 10


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="Markdown report to write after every run.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Only these kinds of faults; default all."
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at the same time.")
@click.option(
    "--forks",
    is_flag=True,
    help="Start programs as forks of a process that has imported everything, which is several times faster.",
)
def main(kills: int, seed: int, report: Path | None, kinds: tuple[str, ...], jobs: int, *, forks: bool) -> None:
    # SIGTERM ends running pipelines first, then the servers, and then unmounts the disk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in kinds or KINDS}
    with tempfile.TemporaryDirectory(prefix="rlhf-faults-") as folder, contextlib.ExitStack() as stack:
        resident = None
        if forks:
            resident = Resident(Path(folder))
            stack.callback(resident.close)
        whole = prepare(Path(folder), resident)
        click.echo(f"undisturbed run: {whole.seconds:.0f} s")
        places = open_places(Path(folder), whole.params, tuple(by_kind), resident, stack)
        free: Counter[int] = Counter({number: place.runs_at_once for number, (place, _) in enumerate(places)})
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        running: dict[Future[list[Outcome]], tuple[int, int]] = {}  # -> its place, and the kills left for it
        left, number = kills, 0
        while left or running:
            while left and len(running) < jobs:
                number += 1
                draws = random.Random(f"{seed}-{number}")
                weights = [len(chosen) * (free[n] > 0) for n, (_, chosen) in enumerate(places)]
                if not sum(weights):
                    break
                (at,) = draws.choices(range(len(places)), weights)
                if number <= len(places) and free[number - 1]:
                    at = number - 1  # so that a small campaign covers every place
                place, chosen = places[at]
                free[at] -= 1
                quota = min(left, MAX_KILLS_PER_RUN, max(1, kills // len(places)))
                left -= quota
                run = place.folder / f"run-{number}"
                running[pool.submit(disturb, whole, place, run, draws, kills=quota, kinds=chosen)] = (at, quota)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                at, quota = running.pop(future)
                free[at] += 1
                outcomes = future.result()
                left += quota - len(outcomes)
                for kind, counts in outcomes:
                    by_kind[kind].update(counts)
                click.echo(f"{', '.join(kind for kind, _ in outcomes) or 'nothing'}: {line(by_kind)}")
                if report:
                    minutes = (time.monotonic() - started) / 60
                    report.write_text(as_markdown(by_kind, kills, seed, jobs, minutes), encoding="utf-8")
    click.echo(line(by_kind))
    total = sum_of(by_kind)
    good = total["kills"] == total["resumed"] == total["equal"] and not total["hangs"] and not total["orphans"]
    sys.exit(0 if good else 1)


def open_places(
    folder: Path, params: Path, kinds: tuple[str, ...], resident: Resident | None, stack: contextlib.ExitStack
) -> list[tuple[FolderPlace, tuple[str, ...]]]:
    """The places where runs are stored, and the faults that are possible in each."""
    places: list[tuple[FolderPlace, tuple[str, ...]]] = []
    for make, name, of_place in (
        (FolderPlace, "", IN_A_FOLDER),
        (Services, "services", WITH_SERVICES),
        (SmallDisk, "disk", ON_A_SMALL_DISK),
    ):
        chosen = tuple(kind for kind in kinds if kind in of_place)
        if not chosen:
            continue
        try:
            place = make(folder / name, params, resident)
        except subprocess.CalledProcessError as error:  # only root may mount
            click.echo(f"LEFT OUT: {', '.join(chosen)} ({error.stderr.decode().strip()})")
            continue
        stack.callback(place.close)
        places.append((place, chosen))
    return places


def sum_of(by_kind: dict[str, Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counts in by_kind.values():
        total.update(counts)
    return total


def line(by_kind: dict[str, Counter[str]]) -> str:
    total = sum_of(by_kind)
    return " ".join(f"{name}={total[name]}" for name in ("kills", "resumed", "equal", "lost_steps", "hangs", "orphans"))


def as_markdown(by_kind: dict[str, Counter[str]], kills: int, seed: int, jobs: int, minutes: float) -> str:
    rows = [
        f"| {kind} | {KINDS[kind]} | {n['kills']} | {n['resumed']} | {n['equal']} | {n['lost_steps']} |"
        for kind, n in by_kind.items()
    ]
    return "\n".join(
        [
            "# Fault campaign",
            "",
            f"`python -m tests.faults --kills {kills} --seed {seed} --jobs {jobs}`, {time.strftime('%Y-%m-%d')}, "
            f"{os.cpu_count()} cores, {platform.machine()} {platform.system()}, Python {platform.python_version()}, "
            f"{minutes:.0f} minutes.",
            "",
            "| kind | fault | times | resumed | same models | steps trained twice |",
            "|---|---|---:|---:|---:|---:|",
            *rows,
            "",
            "Same models: the weights of sft, reward_model and ppo have the digests of the undisturbed run. With MLflow, every metric",
            "also has the same steps, none missing and none duplicated. The small pipeline (a tiny model in fp32, a checkpoint after",
            "every step) is in a folder, in a folder with its checkpoints in SeaweedFS and its metrics in MLflow, or on a tmpfs. A step",
            "counts as trained when a checkpoint of it was started.",
            "",
            f"`{line(by_kind)}`",
            "",
        ]
    )


if __name__ == "__main__":
    main(prog_name="python -m tests.faults")
