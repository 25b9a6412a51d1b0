"""Run the default task over several seeds and report the results: `python -m benchmarks.study --seeds 3` (`make study`).

There are three arms: the presets quick and full on every seed, and one run of quick with a KL coefficient that is far too small,
whose last policy the gate must reject. Each finished run appends one row to benchmarks/movie_study.jsonl. An interrupted study
resumes with the runs that have no row of the same settings. A run that differs from a finished one only in PPO or evaluation
reuses the artifacts of the earlier stages, and reports their original time and memory. At the end the tables and the plots are
written into README.md, docs/results.md, components/README.md and components/ppo/README.md.

--fresh runs quick alone, on seeds from 3, which chose no setting; its table is a section of its own in docs/results.md.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.record import ROOT, append_row, describe_machine, read_rows, settings_digest
from benchmarks.report import write_tables
from benchmarks.stages import rerun, stages_to_run
from benchmarks.study_report import write_fresh_seeds, write_report
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
    """One way to run the pipeline. num_seeds limits the seeds of this arm; None runs all seeds of the study."""

    name: str
    settings: tuple[str, ...]
    num_seeds: int | None = None


ARMS = (
    Arm("quick", ("preset=quick",)),
    Arm(
        "small KL",
        ("preset=quick", "ppo.kl_coef=0.001", "ppo.num_iterations=24", "ppo.eval_every=4", "ppo.keep=last"),
        num_seeds=1,
    ),
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
        """The measured row of these settings, or None."""
        key = {"arm": self.arm.name, "seed": self.seed, "settings_digest": settings_digest(self.params)}
        return next((row for row in read_rows(ROWS) if key.items() <= row.items()), None)


FIRST_FRESH_SEED = 3  # settings were chosen on those before it


def planned_runs(num_seeds: int) -> Iterator[Run]:
    for arm in ARMS:
        for seed in range(num_seeds if arm.num_seeds is None else min(arm.num_seeds, num_seeds)):
            yield Run(arm, seed)


def fresh_runs(num_seeds: int) -> Iterator[Run]:
    for seed in range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + num_seeds):
        yield Run(ARMS[0], seed)


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Run the pipeline as a user does, or only the stages that cannot be reused from a finished run; return the row."""
    number = sum(1 for _ in folder.parent.glob(f"{folder.name}*"))  # keep what an interrupted study left behind
    out = folder if not number else folder.with_name(f"{folder.name}-{number + 1}")
    base = find_reusable_run(run.params, folder.parent)
    if base is None:
        command = [sys.executable, "-m", "pipelines", "run", str(PARAMS), "--out", str(out)]
        for setting in run.settings:
            command += ["--set", setting]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            sys.exit(f"the run of {run.arm.name} with seed {run.seed} failed; see the logs in {out}")
    finished = base or out
    found = rerun(finished, run.params, stages_to_run(load_params(finished / "params.yaml"), run.params), out)
    costs = json.loads((finished / "summary.json").read_text(encoding="utf-8"))["stages"] | found["stages"]
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "preset": run.params.preset,
        "settings": run.settings,
        "settings_digest": settings_digest(run.params),
        "revision": code_revision(),
        "reused": {"run": base.name, "stages": [stage for stage in costs if stage not in found["stages"]]}
        if base
        else {},
        "machine": describe_machine(),
        "seconds": round(sum(stage["seconds"] for stage in costs.values()), 1),
        "stages": costs,
        "promoted": found["decision"] == "promote",
        "reason": found["reason"],
        "evaluation": {name: found["evaluation"][name] for name in EVALUATION_METRICS},
        "evaluation_all": found["evaluation"],
        "history": found["history"],
        "training": found["training"],
        "samples": select_samples(found["samples"], run.seed),
    }


def find_reusable_run(params: Params, folder: Path) -> Path | None:
    """A finished run in folder that differs from params at most in PPO and evaluation, or None."""
    for summary in sorted(folder.glob("*/summary.json")):
        run = summary.parent
        succeeded = json.loads(summary.read_text(encoding="utf-8"))["status"] == "succeeded"
        if succeeded and set(stages_to_run(load_params(run / "params.yaml"), params)) <= {"ppo", "evaluation"}:
            return run
    return None


def select_samples(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """The pairs of responses that the report of the run shows. rows are those of samples.jsonl."""
    gains = [row["ppo"]["judge_score"] - row["sft"]["judge_score"] for row in rows]
    return {
        group: [
            {
                "prompt": rows[i]["prompt"],
                "sft": rows[i]["sft"]["response"],
                "ppo": rows[i]["ppo"]["response"],
                "gain": gains[i],
            }
            for i in indices
        ]
        for group, indices in choose_rows(gains, seed=seed).items()
    }


@click.command(help=__doc__)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number of seeds per arm.")
@click.option("--fresh", is_flag=True, help=f"Run quick alone, on seeds from {FIRST_FRESH_SEED}.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "runs" / "study", help="Folder for the run directories."
)
def main(seeds: int, fresh: bool, out: Path) -> None:
    runs = list(fresh_runs(seeds) if fresh else planned_runs(seeds))
    for number, run in enumerate(runs, start=1):
        row = run.row()
        if row is None:
            print(f"[study] run {number} of {len(runs)}: {run.arm.name}, seed {run.seed}", flush=True)
            row = execute(run, out / f"{run.arm.name.replace(' ', '-')}-seed{run.seed}")
            append_row(ROWS, row)
        numbers = row["evaluation"]
        print(
            f"[study] {run.arm.name}, seed {run.seed}: win rate {numbers['win_rate']:.3f}, KL {numbers['kl']:.2f}, "
            f"{format_duration(row['seconds'])}, {'promoted' if row['promoted'] else 'rejected'}",
            flush=True,
        )
    rows = [row for run in runs if (row := run.row()) is not None]
    if fresh:
        write_fresh_seeds(rows)
        return
    write_tables([row for row in rows if row["arm"] == "quick"])
    write_report(rows)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.study")
