"""Compare learning per sample with TRL's PPO on the movie task: `python -m benchmarks.learning`.

For each seed both systems start from the SFT model and the reward model of one pipeline run, which is made if --runs has none. They
save their policies every few iterations, and each policy is then sampled on the same held-out prompts, scored by the reward model
and by the judge of that run, and compared with the SFT model. Each measured policy is one row of benchmarks/learning.jsonl, and is
never measured again with the same settings. At the end the tables and the plot are written into benchmarks/LEARNING.md.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.learning.arms import (
    OURS_ARM,
    SFT,
    TRL,
    TRL_OWN,
    Arm,
    Job,
    Plan,
    evaluation_job,
    row_key,
    rows_of,
    training_job,
)
from benchmarks.learning.page import tables, write_page
from benchmarks.learning.runs import Artifacts, artifacts_of
from benchmarks.peers.environments import OURS, python_of
from benchmarks.peers.measure import RESULT
from benchmarks.record import ROOT, append_row, describe_machine, read_rows
from components.rlhf.artifacts.revision import code_revision

ROWS = ROOT / "benchmarks" / "learning.jsonl"
SEEDS = (3, 4, 5)  # never used to choose a setting


def measure_seed(seed: int, arms: list[Arm], plan: Plan, *, runs: Path, work: Path, rows: Path, trains: bool) -> None:
    """Train and measure what has no row yet."""
    for arm in arms:
        if not missing_iterations(arm, plan, seed, rows):
            continue
        artifacts = artifacts_of(seed, runs)
        missing = missing_iterations(arm, plan, seed, rows, artifacts.start)
        folder = work / f"seed-{seed}" / arm.folder
        policies = [policy(arm.name, number, folder / f"iteration-{number:02d}") for number in missing]
        if trains:
            train(arm, training_job(arm, plan, seed, artifacts), folder, policies)
        policies = [each for each in policies if Path(each["folder"]).is_dir()]
        if policies and not any(row["system"] == SFT for row in rows_of(read_rows(rows), plan, seed, artifacts.start)):
            policies.insert(0, policy(SFT, 0, artifacts.folders["sft_model"]))
        if policies:
            evaluate(arm, plan, seed, artifacts, policies, folder, rows)
        if not missing_iterations(arm, plan, seed, rows, artifacts.start):
            (folder / "state.pt").unlink(missing_ok=True)  # of TRL, to go on from


def policy(system: str, iteration: int, folder: Path) -> Job:
    return {"system": system, "iteration": iteration, "folder": str(folder)}


def missing_iterations(arm: Arm, plan: Plan, seed: int, rows: Path, start: str | None = None) -> list[int]:
    """The iterations without a row, of the same models as the newest row, or of start."""
    measured = rows_of(read_rows(rows), plan, seed, start)
    done = {row["iteration"] for row in measured if row["system"] == arm.name}
    return [number for number in plan.iterations(seed) if number not in done]


def train(arm: Arm, job: Job, folder: Path, policies: list[Job]) -> None:
    """Train an arm, unless an earlier run with the same job has left all these policies. One that was killed goes on."""
    path = folder / "job.json"
    if not (path.is_file() and json.loads(path.read_text()) == job):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path.write_text(json.dumps(job), encoding="utf-8")
    if all(Path(each["folder"]).is_dir() for each in policies):
        return
    started = time.monotonic()
    print(f"[learning] {arm.name}: training in {folder}", flush=True)
    for _ in start(python_of(arm.environment), arm.module, path, folder / "train.log"):
        pass
    print(f"[learning] {arm.name}: trained in {time.monotonic() - started:.0f} s", flush=True)


def evaluate(
    arm: Arm, plan: Plan, seed: int, artifacts: Artifacts, policies: list[Job], folder: Path, rows: Path
) -> None:
    """Measure policies, append the row of each as soon as it is there, and delete the weights of a measured one."""
    path = folder / "evaluation.json"
    job = evaluation_job(arm, plan, seed, artifacts, folder.parent / "samples", policies)
    path.write_text(json.dumps(job), encoding="utf-8")
    rollouts = plan.params(seed).ppo.rollout.num_prompts
    for found in start(python_of(OURS), "evaluate", path, folder / "evaluate.log"):
        weights = Path(found.pop("folder"))
        row = row_key(found["system"], plan, seed) | found | {"num_rollouts": rollouts * found["iteration"]}
        row |= {
            "run": artifacts.run,
            "start": artifacts.start,
            "revision": code_revision(),
            "machine": describe_machine(),
        }
        append_row(rows, row)
        shown = {name: round(row[name], 3) for name in ("kl", "reward", "judge", "win_rate", "distinct2")}
        print(f"[learning] seed {seed}, {row['system']}, iteration {row['iteration']}: {shown}", flush=True)
        if row["system"] != SFT:
            shutil.rmtree(weights)


def start(python: Path, module: str, job: Path, log: Path) -> Iterator[Any]:
    """Run a program of this package and give what it prints as results; all it prints goes to the log."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_WAIT_POLICY": "passive",  # threads that wait must not spin
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), "-m", f"benchmarks.learning.{module}", str(job.resolve())]
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith(RESULT):
                yield json.loads(line.removeprefix(RESULT))
    if process.returncode:
        lines = log.read_text(encoding="utf-8").splitlines() or [f"exit status {process.returncode}"]
        sys.exit(f"{module} failed ({lines[-1]:.300}); {log} has its output.")


@click.command(help=__doc__)
@click.option("--seeds", default=",".join(map(str, SEEDS)), show_default=True, help="Seeds, with commas between them.")
@click.option("--runs", type=click.Path(path_type=Path), default=ROOT / "runs", help="Folder of the pipeline runs.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "learning", help="Folder for policies and logs."
)
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, help="File for the measured rows.")
@click.option("--iterations", type=click.IntRange(min=1), default=None, help="Fewer iterations, to try this program.")
@click.option("--every", type=click.IntRange(min=1), default=2, show_default=True, help="Iterations between policies.")
@click.option("--prompts", type=click.IntRange(min=2), default=256, show_default=True, help="Held-out prompts.")
@click.option("--trl-defaults", is_flag=True, help="Also train with TRL's default settings, on the first seed.")
@click.option("--measure-only", is_flag=True, help="Train nothing; measure the policies that an ended run has left.")
@click.option("--tables", "only_tables", is_flag=True, help="Measure nothing; write the page of the measured rows.")
def main(
    seeds: str,
    runs: Path,
    work: Path,
    rows: Path,
    iterations: int | None,
    every: int,
    prompts: int,
    trl_defaults: bool,
    measure_only: bool,
    only_tables: bool,
) -> None:
    plan, numbers = Plan(num_iterations=iterations, every=every, num_prompts=prompts), [*map(int, seeds.split(","))]
    for number, seed in enumerate([] if only_tables else numbers):
        arms = [OURS_ARM, TRL] + ([TRL_OWN] if trl_defaults and number == 0 else [])
        measure_seed(seed, arms, plan, runs=runs, work=work, rows=rows, trains=not measure_only)
    measured = {seed: rows_of(read_rows(rows), plan, seed) for seed in numbers}
    if rows == ROWS:
        write_page(measured, plan.params(numbers[0]))
    else:
        print(tables(measured, plan.params(numbers[0])))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.learning")
