"""Time every stage of a toy run, whose work takes a fraction of a second, and compare with importing what the stage needs.

    python -m benchmarks.startup                 # three runs with tracking in SQLite
    python -m benchmarks.startup --tracking URI  # with a tracking server
    python -m benchmarks.startup --no-tracking

What a stage needs is timed in a process of its own that imports it and ends at once, between the runs. CPU seconds include those of
the process that tracks the stage, which runs beside it.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.record import describe_machine
from pipelines.local import runner
from pipelines.local.run import SQLITE, run_pipeline
from pipelines.settings import load_params

MODELS = "import torch, transformers.models.llama.modeling_llama, transformers.modeling_utils\n" + (
    "from transformers import AutoModelForCausalLM, AutoTokenizer"
)
JUDGES = "import scipy.stats, sklearn.feature_extraction.text, sklearn.linear_model, sklearn.model_selection"
NEEDS = {
    "models": ("torch and transformers", MODELS),
    "judges": ("also scikit-learn", f"{MODELS}\n{JUDGES}"),
    "mlflow": ("MLflow", "from mlflow import MlflowClient"),
}
NEED_OF_STAGE = {
    "import_model": "models",
    "prepare_data": "models",
    "sft": "models",
    "reward_model": "models",
    "judge": "judges",
    "ppo": "models",
    "dpo": "models",
    "evaluation": "judges",
    "register": "mlflow",
    "notify": "mlflow",
}


@dataclass(frozen=True)
class Times:
    """Of a process and of those that it waited for."""

    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--tracking", default="", help="URI of a tracking server; without it, a SQLite file")
    group.add_argument("--no-tracking", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    times: dict[str, list[Times]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracking = {"enabled": not options.no_tracking, "uri": options.tracking or f"{SQLITE}{folder}/mlflow.db"}
        params = toy_pipeline(folder, tracking)
        for repeat in range(options.repeats):
            measured = {need: time_import(code) for need, (_, code) in NEEDS.items()}
            measured |= time_stages(params, folder / f"run-{repeat}")
            for what, value in measured.items():
                times.setdefault(what, []).append(value)
    print_table(times, options.repeats)


def toy_pipeline(folder: Path, tracking: dict[str, object]) -> Path:
    from tests.support.tiny_model import make_tiny_model
    from tests.support.toy_pipeline import toy_params, write_data, write_params

    model = make_tiny_model(folder / "model", seed=0)
    return write_params(folder / "toy.yaml", toy_params(model, write_data(folder), tracking=tracking))


@contextlib.contextmanager
def timed(times: dict[str, Times], name: str) -> Iterator[None]:
    """Time the processes that are started and end within the block."""
    wall, cpu = time.monotonic(), _cpu_of_children()
    yield
    times[name] = Times(time.monotonic() - wall, _cpu_of_children() - cpu)


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def time_import(code: str) -> Times:
    """A process that imports, and ends without freeing what it has imported."""
    times: dict[str, Times] = {}
    with timed(times, ""):
        subprocess.run([sys.executable, "-c", f"{code}\nimport os\nos._exit(0)"], check=True)
    return times[""]


def time_stages(params: Path, run: Path) -> dict[str, Times]:
    times: dict[str, Times] = {}
    run_process = runner.run_process

    def run_timed(record: runner.StageRecord, *arguments: Any) -> None:
        with timed(times, record.name):
            run_process(record, *arguments)

    runner.run_process = run_timed
    try:
        with open(os.devnull, "w") as nowhere:
            summary = run_pipeline(load_params(params, ()), run, tracking_uri="", console=Console(file=nowhere))
    finally:
        runner.run_process = run_process
    if summary["status"] != "succeeded":
        sys.exit(f"the run failed: {summary['reason']}")
    return times


def print_table(times: dict[str, list[Times]], repeats: int) -> None:
    print(f"Medians of {repeats} runs; {describe_machine()}; load {os.getloadavg()[0]:.1f}.\n")
    print("| stage | seconds | CPU seconds | needs | seconds to import it | CPU seconds | CPU seconds beyond it |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for stage, need in NEED_OF_STAGE.items():
        (wall, cpu), (import_wall, import_cpu) = (_medians(times[what]) for what in (stage, need))
        print(
            f"| {stage} | {wall:.1f} | {cpu:.1f} | {NEEDS[need][0]} | {import_wall:.1f} | {import_cpu:.1f} | {cpu - import_cpu:.1f} |"
        )


def _medians(times: list[Times]) -> tuple[float, float]:
    return statistics.median(each.wall for each in times), statistics.median(each.cpu for each in times)


if __name__ == "__main__":
    main()
