"""Run the default task over several seeds and write what it came to: `python -m benchmarks.study --seeds 3` (`make study`).

Three arms: the presets quick and full, each on every seed, and once the quick one with far too small a KL coefficient, which the
gate must reject. Each finished run appends one row to benchmarks/movie_study.jsonl; a study that was interrupted goes on with the
runs that have no row of these settings yet. At the end the tables and the plot of all rows are written into the documents.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.record import ROOT, append, digest_of, machine, rows_of
from benchmarks.report import write_tables
from benchmarks.study_report import write_report
from components.evaluation.samples import choose_rows
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.params import Params
from components.rlhf.edges.progress import clock
from pipelines.settings import load_params
from pipelines.summary import find_output

ROWS = ROOT / "benchmarks" / "movie_study.jsonl"
PARAMS = ROOT / "pipelines" / "params" / "movie_reviews.yaml"


@dataclass(frozen=True)
class Arm:
    """One way to run the pipeline; num_seeds None is as many as the study has."""

    name: str
    settings: tuple[str, ...]
    num_seeds: int | None = None


ARMS = (
    Arm("quick", ("preset=quick",)),
    Arm("small KL", ("preset=quick", "ppo.kl_coef=0.001", "ppo.num_iterations=24", "ppo.eval_every=4"), num_seeds=1),
    Arm("full", ("preset=full",)),
)


@dataclass(frozen=True)
class Run:
    """One arm on one seed."""

    arm: Arm
    seed: int

    @property
    def settings(self) -> list[str]:
        return [*self.arm.settings, f"seed={self.seed}"]

    @property
    def params(self) -> Params:
        return load_params(PARAMS, self.settings)

    def row(self) -> dict[str, Any] | None:
        """What the file of rows has of these settings, if anything."""
        key = {"arm": self.arm.name, "seed": self.seed, "settings_digest": digest_of(self.params)}
        return next((row for row in rows_of(ROWS) if key.items() <= row.items()), None)


def planned(num_seeds: int) -> Iterator[Run]:
    for arm in ARMS:
        for seed in range(num_seeds if arm.num_seeds is None else min(arm.num_seeds, num_seeds)):
            yield Run(arm, seed)


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Run the pipeline as a user does and return its row."""
    number = sum(1 for _ in folder.parent.glob(f"{folder.name}*"))  # what an interrupted study left stays where it is
    out = folder if not number else folder.with_name(f"{folder.name}-{number + 1}")
    command = [sys.executable, "-m", "pipelines", "run", str(PARAMS), "--out", str(out)]
    for setting in run.settings:
        command += ["--set", setting]
    revision = code_revision()
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit(f"{run.arm.name}, seed {run.seed} failed; see {out}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    artifacts = out / "artifacts"
    policy, evaluation = find_output(artifacts, "ppo", "model"), find_output(artifacts, "evaluation", "evaluation")
    assert policy is not None and evaluation is not None
    del summary["paths"], summary["open"]
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "settings": run.settings,
        "settings_digest": digest_of(run.params),
        "revision": revision,
        "machine": machine(),
        "seconds": round(sum(stage["seconds"] for stage in summary["stages"].values()), 1),
        **summary,
        "history": rows_of(policy / "history.jsonl"),
        "training": rows_of(evaluation / "training.jsonl"),
        "samples": chosen_samples(evaluation / "samples.jsonl", run.seed),
    }


def chosen_samples(path: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The pairs of answers that the run's own report shows."""
    rows = rows_of(path)
    gains = [row["ppo"]["judge_score"] - row["sft"]["judge_score"] for row in rows]
    return {
        group: [
            {
                "prompt": rows[i]["prompt"],
                "sft": rows[i]["sft"]["response"],
                "ppo": rows[i]["ppo"]["response"],
                "gain": gains[i],
            }
            for i in chosen
        ]
        for group, chosen in choose_rows(gains, seed=seed).items()
    }


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Seeds of each arm, from 0.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "runs" / "study", help="Where the runs are kept."
)
def main(seeds: int, out: Path) -> None:
    runs = list(planned(seeds))
    for number, run in enumerate(runs, start=1):
        row = run.row()
        if row is None:
            print(f"[study] run {number} of {len(runs)}: {run.arm.name}, seed {run.seed}", flush=True)
            row = execute(run, out / f"{run.arm.name.replace(' ', '-')}-seed{run.seed}")
            append(ROWS, row)
        numbers = row["evaluation"]
        print(
            f"[study] {run.arm.name}, seed {run.seed}: win rate {numbers['win_rate']:.3f}, KL {numbers['kl']:.2f}, "
            f"{clock(row['seconds'])}, {'promoted' if row['promoted'] else 'rejected'}",
            flush=True,
        )
    rows = [row for run in runs if (row := run.row()) is not None]
    write_tables([row for row in rows if row["arm"] == "quick"])
    write_report(rows)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.study")
