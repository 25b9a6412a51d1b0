"""Compare PPO and DPO on the movie task over several seeds: `python -m benchmarks.policies --seeds 3`.

Each seed is one run of the preset quick with policy.method both, whose policies start from the same SFT model and are compared with it
by the same judge on the same prompts. A finished run of the same settings in --out is taken as it is. Each run is one row of
benchmarks/movie_policies.jsonl, and is never run again with the same settings. At the end the table is written into docs/results.md.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from benchmarks.record import ROOT, append_row, describe_machine, read_rows, replace_section, settings_digest
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.params import Params
from components.rlhf.config.policy import TITLES
from pipelines.settings import load_params

ROWS = ROOT / "benchmarks" / "movie_policies.jsonl"
PARAMS = ROOT / "pipelines" / "params" / "movie_reviews.yaml"
OF_DPO = ("dpo", "evaluation-2")  # the stages that a run with PPO alone does not have
Row = dict[str, Any]


def settings_of(seed: int) -> list[str]:
    return ["preset=quick", "policy.method=both", f"seed={seed}"]


def find_row(rows: Sequence[Row], seed: int) -> Row | None:
    """The newest row of a seed with these settings, or None."""
    key = {"seed": seed, "settings_digest": settings_digest(load_params(PARAMS, settings_of(seed)))}
    return next((row for row in reversed(rows) if key.items() <= row.items()), None)


def find_run(params: Params, folder: Path) -> Path | None:
    """A run in folder that has succeeded with these settings, or None."""
    for summary in sorted(folder.glob("*/summary.json")):
        succeeded = json.loads(summary.read_text(encoding="utf-8"))["status"] == "succeeded"
        if succeeded and settings_digest(load_params(summary.parent / "params.yaml")) == settings_digest(params):
            return summary.parent
    return None


def measure(seed: int, folder: Path) -> Row:
    """The row of a seed, from a finished run or a new one."""
    settings = settings_of(seed)
    run = find_run(load_params(PARAMS, settings), folder)
    if run is None:
        run = folder / f"both-{seed}"
        options = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "pipelines", "run", str(PARAMS), "--out", str(run), *options]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            sys.exit(f"the run of seed {seed} failed; see the logs in {run}")
    return row_of(run, seed)


def row_of(run: Path, seed: int) -> Row:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "seed": seed,
        "settings_digest": settings_digest(load_params(PARAMS, settings_of(seed))),
        "revision": code_revision(),
        "machine": describe_machine(),
        "to_gate": summary["method"],
        "policies": summary["policies"],
        "seconds": {name: stage["seconds"] for name, stage in summary["stages"].items()},
    }


def as_table(rows: Sequence[Row]) -> str:
    """A line for each policy, and the share of time that DPO adds."""
    lines = [
        "| seed | policy | win rate | KL to SFT | distinct-2 | decision | trained in |",
        "|---:|---|---|---:|---:|---|---:|",
    ]
    for row in rows:
        for method, policy in row["policies"].items():
            numbers = policy["evaluation"]
            rate = f"{numbers['win_rate']:.3f} [{numbers['win_rate_low']:.3f}, {numbers['win_rate_high']:.3f}]"
            decision = policy["decision"] + (", to the gate" if method == row["to_gate"] else "")
            lines.append(
                f"| {row['seed']} | {TITLES[method]} | {rate} | {numbers['kl']:.2f} | {numbers[f'distinct2_{method}']:.3f} | {decision} | "
                f"{row['seconds'][method]:.0f} s |"
            )
    added = [added_share(row["seconds"]) for row in rows]
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    share = f"{100 * fmean(added):.0f}%" + (
        f" ({100 * min(added):.0f}% to {100 * max(added):.0f}%)" if len(added) > 1 else ""
    )
    lines += ["", f"DPO and its evaluation add {share} to the time of the other stages. {machines}."]
    return "\n".join(lines)


def added_share(seconds: dict[str, float]) -> float:
    """Time of DPO and its evaluation over that of all other stages."""
    own = sum(seconds[name] for name in OF_DPO)
    return own / (sum(seconds.values()) - own)


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds, from 0.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "runs" / "policies", help="Folder of the runs.")
def main(seeds: int, out: Path) -> None:
    for seed in range(seeds):
        if find_row(read_rows(ROWS), seed) is None:
            append_row(ROWS, measure(seed, out))
    measured = read_rows(ROWS)
    rows = [row for seed in range(seeds) if (row := find_row(measured, seed))]
    replace_section(ROOT / "docs" / "results.md", "policies", as_table(rows))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.policies")
