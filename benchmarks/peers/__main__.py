"""Measure training against peers: `python -m benchmarks.peers NAME... [--rounds N] [--iterations N] [--only TEXT] [--tables]`.

Each benchmark starts its systems in turn, in processes of their own, writes benchmarks/results/NAME.json, prints its table and
rewrites its section of benchmarks/README.md. benchmarks/README.md explains the benchmarks.
"""

import argparse
import sys
from collections.abc import Callable

from benchmarks.peers import ceiling, growth
from benchmarks.peers.goals import AllRows
from benchmarks.peers.inputs import make_inputs
from benchmarks.peers.processes import Arm, measure
from benchmarks.peers.rows import Row, load_rows, save_rows
from benchmarks.peers.settings import ARMS
from benchmarks.peers.tables import section
from benchmarks.record import ROOT, replace_section

README = ROOT / "benchmarks" / "README.md"
ALL_ARMS: dict[str, Callable[[int], list[Arm]]] = {"ceiling": ceiling.arms, **ARMS, "growth": growth.arms}
# Processes of each system, and measured iterations of each process.
ROUNDS = {"ceiling": 2, "ppo": 2, "chat": 2, "train": 3, "rollout": 3, "growth": 1}
ITERATIONS = {"ceiling": 10, "ppo": 2, "chat": 1, "train": 4, "rollout": 3, "growth": 3}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.tables:
        for name in options.names:
            print(f"{name}\n\n{write_section(name)}\n")
        return
    make_inputs()
    for name in options.names:
        run(name, options)
    if "ppo" in options.names or "chat" in options.names:
        write_section("ceiling")  # it also shows the share that these reach


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = ", ".join(ALL_ARMS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Measure training against peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all (the default), or any of {names}")
    for option, what in (
        ("--rounds", "processes of each system"),
        ("--iterations", "measured iterations of a process"),
    ):
        parser.add_argument(option, type=int, default=0, metavar="N", help=f"{what}; each benchmark has a default")
    only = "only systems and settings that contain this text, such as 'TRL: 32 prompts'; others keep their rows"
    parser.add_argument("--only", default="", metavar="TEXT", help=only)
    parser.add_argument(
        "--tables", action="store_true", help="measure nothing; print and write the tables of the saved rows"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in (*ALL_ARMS, "all")]
    if unknown:
        sys.exit(f"There is no benchmark {unknown[0]}; choose from {names}, or all.")
    if min(options.rounds, options.iterations) < 0:
        sys.exit("--rounds and --iterations are numbers of at least 1.")
    if not options.names or "all" in options.names:
        options.names = list(ALL_ARMS)
    return options


def run(name: str, options: argparse.Namespace) -> None:
    arms = ALL_ARMS[name](options.iterations or ITERATIONS[name])
    arms = [arm for arm in arms if options.only in f"{arm.system}: {arm.setting}"]
    if not arms:
        sys.exit(f"{name} has no system or setting that contains {options.only!r}.")
    measured: list[Row] = []
    for measured in measure(name, arms, options.rounds or ROUNDS[name]):
        save_rows(name, measured, keep_others=True)  # what was measured is kept if a later process fails
    rows = save_rows(name, measured, keep_others=bool(options.only))
    if name == "growth":
        from benchmarks.peers.growth_plot import draw

        draw(rows)
    print(f"\n{write_section(name)}\n", flush=True)


def write_section(name: str) -> str:
    """Rewrite the section of a benchmark from all saved rows, and return it."""
    rows: AllRows = {each: load_rows(each) for each in ALL_ARMS}
    text = section(name, rows)
    replace_section(README, name, text)
    return text


if __name__ == "__main__":
    main()
