"""Time every stage of a toy run, whose work takes a fraction of a second, and compare with importing what the stage needs.

    python -m benchmarks.startup                 # three runs with tracking in SQLite
    python -m benchmarks.startup --tracking URI  # with a tracking server
    python -m benchmarks.startup --no-tracking

What a stage needs is timed in a process of its own that imports it and ends at once, between the runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import describe_machine
from pipelines.local.run import SQLITE

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
    "evaluation": "judges",
    "register": "mlflow",
    "notify": "mlflow",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--tracking", default="", help="URI of a tracking server; without it, a SQLite file")
    group.add_argument("--no-tracking", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracking = {"enabled": not options.no_tracking, "uri": options.tracking or f"{SQLITE}{folder}/mlflow.db"}
        params = toy_pipeline(folder, tracking)
        for repeat in range(options.repeats):
            measured = {need: time_import(code) for need, (_, code) in NEEDS.items()}
            measured |= time_stages(params, folder / f"run-{repeat}")
            for what, value in measured.items():
                seconds.setdefault(what, []).append(value)
    print_table(seconds, options.repeats)


def toy_pipeline(folder: Path, tracking: dict[str, object]) -> Path:
    from tests.support.tiny_model import make_tiny_model
    from tests.support.toy_pipeline import toy_params, write_data, write_params

    model = make_tiny_model(folder / "model", seed=0)
    return write_params(folder / "toy.yaml", toy_params(model, write_data(folder), tracking=tracking))


def time_import(code: str) -> float:
    """Seconds of a process that imports and ends without freeing what it has imported."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", f"{code}\nimport os\nos._exit(0)"], check=True)
    return time.monotonic() - started


def time_stages(params: Path, run: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "pipelines", "run", str(params), "--out", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    stages = json.loads((run / "summary.json").read_text(encoding="utf-8"))["stages"]
    return {stage: stages[stage]["seconds"] for stage in NEED_OF_STAGE}


def print_table(seconds: dict[str, list[float]], repeats: int) -> None:
    print(f"Median (least) of {repeats} runs; {describe_machine()}.\n")
    print("| stage | seconds | needs | seconds to import it | seconds beyond it |\n|---|---:|---|---:|---:|")
    for stage, need in NEED_OF_STAGE.items():
        beyond = statistics.median(s - n for s, n in zip(seconds[stage], seconds[need], strict=True))
        print(f"| {stage} | {_summary(seconds[stage])} | {NEEDS[need][0]} | {_summary(seconds[need])} | {beyond:.1f} |")


def _summary(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f})"


if __name__ == "__main__":
    main()
