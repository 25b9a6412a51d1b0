"""Run the default task over several seeds and write what it came to: `python -m benchmarks.study --seeds 3` (`make study`).

Three arms: the presets quick and full, each on every seed, and once the quick one with far too small a KL coefficient, which the
gate must reject. Each finished run appends one row to benchmarks/movie_study.jsonl; a study that was interrupted goes on with the
runs that have no row of these settings yet, and a run that differs from a finished one in PPO or evaluation alone takes that one's
artifacts, and what they cost, for the stages before. At the end the tables and the plot are written into the documents.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.record import ROOT, append, command_digest, machine, rows_of
from benchmarks.report import write_tables
from benchmarks.stages import rerun, stages_to_run
from benchmarks.study_report import write_report
from components.evaluation.samples import choose_rows
from components.rlhf.artifacts.revision import code_revision
from components.rlhf.config.params import Params
from components.rlhf.text.progress import format_duration
from pipelines.local.summary import EVALUATION_METRICS
from pipelines.settings import load_params

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
        key = {"arm": self.arm.name, "seed": self.seed, "settings_digest": command_digest(self.params)}
        return next((row for row in rows_of(ROWS) if key.items() <= row.items()), None)


def planned(num_seeds: int) -> Iterator[Run]:
    for arm in ARMS:
        for seed in range(num_seeds if arm.num_seeds is None else min(arm.num_seeds, num_seeds)):
            yield Run(arm, seed)


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Run the pipeline as a user does, or its last stages on a finished run that shares the others, and return the row."""
    number = sum(1 for _ in folder.parent.glob(f"{folder.name}*"))  # what an interrupted study left stays where it is
    out = folder if not number else folder.with_name(f"{folder.name}-{number + 1}")
    base = sharing(run.params, folder.parent)
    if base is None:
        command = [sys.executable, "-m", "pipelines", "run", str(PARAMS), "--out", str(out)]
        for setting in run.config:
            command += ["--set", setting]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            sys.exit(f"{run.arm.name}, seed {run.seed} failed; see {out}")
    before = base or out
    found = rerun(before, run.params, stages_to_run(load_params(before / "params.yaml"), run.params), out)
    costs = json.loads((before / "summary.json").read_text(encoding="utf-8"))["stages"] | found["stages"]
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "preset": run.params.preset,
        "settings": run.config,
        "settings_digest": command_digest(run.params),
        "revision": code_revision(),
        "reused": {"run": base.name, "stages": [stage for stage in costs if stage not in found["stages"]]}
        if base
        else {},
        "machine": machine(),
        "seconds": round(sum(stage["seconds"] for stage in costs.values()), 1),
        "stages": costs,
        "promoted": found["decision"] == "promote",
        "reason": found["reason"],
        "evaluation": {name: found["evaluation"][name] for name in EVALUATION_METRICS},
        "evaluation_all": found["evaluation"],
        "history": found["history"],
        "training": found["training"],
        "samples": chosen_samples(found["samples"], run.seed),
    }


def sharing(params: Params, folder: Path) -> Path | None:
    """A finished run whose stages before PPO are those of params, so that only PPO and evaluation are left, or nothing."""
    for summary in sorted(folder.glob("*/summary.json")):
        run = summary.parent
        finished = json.loads(summary.read_text(encoding="utf-8"))["status"] == "succeeded"
        if finished and set(stages_to_run(load_params(run / "params.yaml"), params)) <= {"ppo", "evaluation"}:
            return run
    return None


def chosen_samples(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """The pairs of answers that the run's own report shows. rows are those of samples.jsonl."""
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
            f"{format_duration(row['seconds'])}, {'promoted' if row['promoted'] else 'rejected'}",
            flush=True,
        )
    rows = [row for run in runs if (row := run.row()) is not None]
    write_tables([row for row in rows if row["arm"] == "quick"])
    write_report(rows)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.study")
